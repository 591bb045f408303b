"""SwanLab without surprises: offline by default, no account, no prompt, no network; finished when training is.

What is logged comes from training; runs are kept in outputs/swanlog.
"""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..support.errors import MachineError, SettingError, first_line
from ..support.paths import outputs_dir

if TYPE_CHECKING:
    from transformers import TrainerCallback

MODES = {"offline": "offline", "local": "local", "cloud": "online", "disabled": "disabled"}
"""Our names of the modes and SwanLab's own."""

PROJECT = "glm4-course"


@dataclass(frozen=True)
class TrackedRun:
    """A run that SwanLab keeps: how, under which id, and in which folder (None where nothing is written)."""

    mode: str
    id: str
    folder: str | None

    def settings(self) -> dict[str, Any]:
        """For a JSON file, to be given to `start_run` as `earlier` when the run is resumed."""
        return asdict(self)


def start_run(
    mode: str = "offline",
    project: str = PROJECT,
    name: str | None = None,
    directory: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    earlier: Mapping[str, Any] | None = None,
) -> TrackedRun:
    """Start a run; its files go to `directory` (default: outputs/swanlog). A run still active is finished first.

    offline keeps files that `swanlab sync` can send later; local feeds SwanLab's dashboard (`swanlab watch`); cloud
    sends as it goes and needs an API key; disabled does nothing. `earlier`, the settings of an interrupted run,
    continues that one in the cloud; see `replay` for the others. Raises SettingError for an unknown mode or a
    missing key, MachineError where the dashboard is not installed or the cloud can't be reached. Never asks anything.
    """
    check_mode(mode)
    import swanlab

    folder = Path(directory) if directory is not None else outputs_dir("swanlog")
    again = {"id": earlier["id"], "resume": "allow"} if mode == "cloud" and earlier and earlier["mode"] == mode else {}
    options = {"project": project, "name": name, "log_dir": str(folder), "config": dict(config or {}), **again}
    try:
        with _banner(mode):
            run = swanlab.init(reinit=True, mode=MODES[mode], settings=_settings(swanlab), **options)
    except Exception as error:  # what SwanLab raises differs by cause: no key, no network, its own HTTP errors
        if mode != "cloud":
            raise
        raise MachineError(
            f"SwanLab's cloud can't be used: {first_line(error)}",
            "Check network and key, or use offline tracking and send the run later with `swanlab sync`.",
        ) from error
    return TrackedRun(mode, run.id, None if mode == "disabled" else str(run.dir))


def tracking_callback() -> TrainerCallback:
    """SwanLab's own callback, which sends a trainer's logs and settings to the active run.

    It stands in for `report_to="swanlab"`, which crashes in transformers 5.23.
    """
    from swanlab.integration.transformers import SwanLabCallback

    return SwanLabCallback()


def log_answers(record: Mapping[str, Any]) -> None:
    """Log answers at a checkpoint as text, with their stop rate; nothing without an active run.

    `record` has step, stop_rate and answers, each with question, answer and stopped.
    """
    import swanlab

    if not swanlab.has_run():
        return
    texts = [
        swanlab.Text(f"{given['question']}\n\n{given['answer']}", caption="stopped" if given["stopped"] else "cut off")
        for given in record["answers"]
    ]
    swanlab.log({"answers": texts, "dev/stop_rate": record["stop_rate"]}, step=record["step"])


def replay(
    log_history: Sequence[Mapping[str, Any]],
    answered: Sequence[Mapping[str, Any]],
    earlier: Mapping[str, Any],
) -> None:
    """Log again what came before an interruption, so that one run holds all of it; drop the interrupted run's files.

    `earlier` are the interrupted run's settings. SwanLab continues runs in the cloud only, where nothing is lost.
    """
    import swanlab
    from swanlab.integration.transformers import rewrite_logs

    if earlier["mode"] == "cloud" and swanlab.get_run().mode == "online":
        return
    for step in sorted({row["step"] for row in log_history} | {record["step"] for record in answered}):
        for row in (row for row in log_history if row["step"] == step):
            swanlab.log(rewrite_logs({key: value for key, value in row.items() if key != "step"}), step=step)
        for record in (record for record in answered if record["step"] == step):
            log_answers(record)
    if earlier["folder"] and earlier["mode"] != "cloud":
        shutil.rmtree(earlier["folder"], ignore_errors=True)


def finish_run(error: BaseException | None = None) -> None:
    """End the active run, as crashed or aborted where `error` ended training; nothing without a run."""
    import swanlab

    if not swanlab.has_run():
        return
    with _banner(swanlab.get_run().mode):
        if error is None:
            swanlab.finish()
        elif isinstance(error, KeyboardInterrupt):
            swanlab.finish(state="aborted")
        else:
            swanlab.finish(state="crashed", error=f"{type(error).__name__}: {error}")


def check_mode(mode: str) -> None:
    """Raise SettingError or MachineError for what would make SwanLab prompt, hang or crash in this mode."""
    if mode not in MODES:
        raise SettingError(f"There is no tracking mode {mode!r}.", f"Use one of {', '.join(MODES)}.")
    if mode == "disabled":
        return
    if "SWANLAB_PROJECT" in os.environ:
        raise SettingError(
            "The variable SWANLAB_PROJECT is set, which SwanLab 0.10 can't read.",
            "Unset it, or use SWANLAB_PROJ_NAME instead.",
        )
    if mode == "local" and importlib.util.find_spec("swanboard") is None:
        raise MachineError(
            "Local tracking needs SwanLab's dashboard, which is not installed.",
            'Run: pip install "swanlab[dashboard]"   (or use offline tracking)',
        )
    if mode == "cloud" and not _has_key():
        raise SettingError(
            "Cloud tracking needs a SwanLab API key, and none was found.",
            "Run `swanlab login` once or set SWANLAB_API_KEY; or use offline tracking and `swanlab sync` later.",
        )


def _has_key() -> bool:
    import swanlab

    return bool(swanlab.Settings().api_key)


def _settings(swanlab: Any) -> Any:
    """Settings that never prompt, leave the terminal alone, and keep host name, folders and git remotes out."""
    return swanlab.Settings(
        interactive=False,
        terminal=swanlab.Settings.Terminal(proxy_type="none"),
        probe=swanlab.Settings.Probe(runtime=False, git=False, requirements=False, conda=False),
    )


@contextmanager
def _banner(mode: str) -> Iterator[None]:
    """Let SwanLab's lines through where they hold the address of the run; elsewhere they only name a folder."""
    if mode in ("cloud", "online"):
        yield
    elif "IPython" in sys.modules:  # SwanLab prints to a notebook as rich output, past standard output
        from IPython.utils.capture import capture_output

        with capture_output():
            yield
    else:
        with redirect_stdout(io.StringIO()):
            yield
