"""``course``: run the six notebooks in order, with progress, times and figures.

Copies are executed into outputs/notebooks/; ``--in-place`` refreshes the committed notebooks instead. What the
notebooks do is written in them alone.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...support.errors import CourseError, SettingError
from ...support.files import read_json
from ...support.paths import home, outputs_dir
from . import add_json, add_profile, chosen_profile, show

HELP = "run the six notebooks, then print the scores before and after"
EXAMPLES = """\
examples:
  python -m glm4_helpers course               copies of all six, into outputs/notebooks/; some minutes
  python -m glm4_helpers course --only 04 05
  python -m glm4_helpers course --in-place    refreshes the outputs of the committed notebooks"""

LINE_SECONDS = 60
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_profile(parser)
    parser.add_argument("--only", nargs="+", metavar="NUMBER", help="these notebooks alone, such as 04 05")
    parser.add_argument(
        "--in-place", action="store_true", help="write the outputs into notebooks/ itself, without widgets and timings"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    profile = chosen_profile(arguments)
    started, figures = time.monotonic(), {}
    for path in chosen_notebooks(arguments.only):
        print(f"{path.stem}", flush=True)
        target = path if arguments.in_place else outputs_dir("notebooks") / path.name
        seconds = run_notebook(path, target, profile.name, clean=arguments.in_place)
        figures[path.stem] = {"seconds": round(seconds, 1), "metrics": recorded_metrics(path.stem)}
        print(f"  {seconds:.0f} s  {_one_line(figures[path.stem]['metrics'])}", flush=True)
    print(f"all of them: {time.monotonic() - started:.0f} s\n", flush=True)
    result = stored_result(profile.name)
    show(arguments, {"notebooks": figures, "before_after": result}, _table(result))
    return 0


def chosen_notebooks(only: list[str] | None = None) -> list[Path]:
    """The notebooks of the course in order, or those whose numbers are given. Raises SettingError, CourseError."""
    folder = home() / "notebooks"
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise CourseError(f"There are no notebooks in {folder}.", "Restore them: git checkout -- notebooks")
    wanted = {number.zfill(2) for number in only or ()}
    unknown = wanted - {path.name[:2] for path in found}
    if unknown:
        raise SettingError(
            f"There is no notebook {', '.join(sorted(unknown))}.",
            f"Use numbers among {', '.join(path.name[:2] for path in found)}.",
        )
    return [path for path in found if not wanted or path.name[:2] in wanted]


def recorded_metrics(stem: str) -> dict[str, Any]:
    """The figures that a notebook's last cell wrote, or an empty dict."""
    return read_json(outputs_dir("metrics") / f"{stem}.json") or {}


def stored_result(profile_name: str) -> dict[str, Any] | None:
    """The before/after scores that notebook 06 stored for a profile, or None."""
    return read_json(outputs_dir(profile_name) / "before_after.json")


def run_notebook(source: Path, target: Path, profile_name: str, clean: bool = False) -> float:
    """Execute ``source`` in a fresh kernel of this Python, write it to ``target``, and return the seconds it took.

    Says which cell is running. With ``clean`` the outputs are made fit to be committed, and a
    failed run leaves ``target`` as it was; without, what was done until the failure is kept. Raises CourseError.
    """
    import nbformat
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    notebook = nbformat.read(source, as_version=4)
    started = time.monotonic()
    with _life_signs(notebook) as cell_starts:
        client = _client(notebook, source.parent, cell_starts)
        try:
            client.execute(env=_environment(profile_name))
        except (CellExecutionError, DeadKernelError) as error:
            if not clean:
                nbformat.write(notebook, target)
            raise _failure(source, target, notebook, error) from error
        except AssertionError:
            # nbclient answers Ctrl-C by taking the kernel down, and then misses it.
            if client.km is not None:
                raise
            raise KeyboardInterrupt from None
    if clean:
        make_committable(notebook)
    nbformat.write(notebook, target)
    return time.monotonic() - started


def _client(notebook, folder: Path, cell_starts):
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class SameInterpreter(AsyncKernelManager):
        """The kernel runs in this Python, whatever kernel called python3 the user may have registered."""

        def format_kernel_cmd(self, extra_arguments=None):
            return [sys.executable, "-m", "ipykernel_launcher", "--log-level=ERROR", "-f", self.connection_file]

    return NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        kernel_manager_class=SameInterpreter,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
        on_cell_start=cell_starts,
    )


def _environment(profile_name: str) -> dict[str, str]:
    """The kernel's environment: as a learner has it, so without the command line's own quieting of the libraries,
    and with this package, whether it is installed or run from its folder."""
    quieted = ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY")
    kept = {name: value for name, value in os.environ.items() if name not in quieted}
    package = str(Path(__file__).resolve().parents[3])
    search = os.pathsep.join(filter(None, [package, kept.get("PYTHONPATH")]))
    return {**kept, "GLM4_HOME": str(home()), "GLM4_PROFILE": profile_name, "PYTHONPATH": search, "PYTHONHASHSEED": "0"}


@contextmanager
def _life_signs(notebook) -> Iterator[Any]:
    """Gives nbclient's hook for the start of a cell, and says which cell is running: in a terminal one line that
    changes, elsewhere (a log, a pipe) a line for every LINE_SECONDS that a cell takes."""
    codes = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    current: dict[str, Any] = {"where": "starting the kernel", "since": time.monotonic()}
    finished = threading.Event()
    live = sys.stdout.isatty()

    def cell_starts(cell, cell_index: int) -> None:
        if cell.cell_type == "code":
            number = f"code cell {codes.index(cell_index) + 1} of {len(codes)}"
            current.update(where=f"{number}, {_heading(notebook, cell_index)}", since=time.monotonic())

    def beat() -> None:
        shown = current["since"]
        while not finished.wait(0.2):
            now, width = time.monotonic(), shutil.get_terminal_size().columns - 1
            line = f"  {current['where']}: {now - current['since']:.0f} s"
            if live:
                print("\r" + line[:width].ljust(width), end="", flush=True)
            elif now - max(shown, current["since"]) >= LINE_SECONDS:
                print(line, flush=True)
                shown = now
        if live:
            print("\r" + " " * width, end="\r", flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield cell_starts
    finally:
        finished.set()
        thread.join()


def _heading(notebook, cell_index: int) -> str:
    """The last heading above a cell."""
    prose = [cell.source for cell in notebook.cells[:cell_index] if cell.cell_type == "markdown"]
    headings = re.findall(r"^#+ (.+)$", "\n".join(prose), re.MULTILINE)
    return headings[-1] if headings else "the beginning"


def _failure(source: Path, target: Path, notebook, error: Exception) -> CourseError:
    failed = [
        (number, output)
        for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1)
        for output in cell.outputs
        if output.output_type == "error"
    ]
    where = f"code cell {failed[-1][0]}" if failed else "the kernel"
    what = f"{failed[-1][1].ename}: {failed[-1][1].evalue}" if failed else str(error)
    return CourseError(
        f"{source.stem} failed in {where}: {what}",
        f"Open {target if target.exists() else source} in JupyterLab and run it up to there.",
    )


# Outputs fit to be committed


def make_committable(notebook) -> None:
    """Strip what changes from run to run or belongs to one machine: widgets, timings, versions, absolute paths."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells, 1):
        cell.setdefault("id", f"cell-{number:02}")
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [_cleaned(output) for output in cell.outputs if not _is_only_widget(output)]


def _is_only_widget(output: Mapping[str, Any]) -> bool:
    """Whether an output is a widget whose text says no more than that: `VBox(children=(...` and the like."""
    data = output.get("data", {})
    says_nothing = re.match(r"\w+\(", data.get("text/plain", "")) or not data.get("text/plain")
    return WIDGET_VIEW in data and set(data) <= {WIDGET_VIEW, "text/plain"} and bool(says_nothing)


def _cleaned(output):
    if "text" in output:
        output.text = without_machine_paths(output.text)
    data = output.get("data", {})
    data.pop(WIDGET_VIEW, None)
    for kind, content in data.items():
        if isinstance(content, str) and (kind.startswith("text/") or kind == "image/svg+xml"):
            data[kind] = without_machine_paths(content)
    return output


def without_machine_paths(text: str) -> str:
    """``text`` with paths inside the course folder made relative, and the user's own folder as ~."""
    text = re.sub(re.escape(str(home())) + r"/?", "", text)
    return text.replace(str(Path.home()) + os.sep, "~" + os.sep)


# What is printed


def _one_line(metrics: Mapping[str, Any]) -> str:
    shown = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
    )
    return ", ".join(shown)


def _table(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "No scores yet: notebook 06 stores them."
    from ...evaluation import format_table

    return format_table(result)
