"""The notebooks: fit to be committed, made as the course makes them, each running alone, and each cell twice."""

import ast
import copy
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from optional_packages import absent

import glm4_helpers
from glm4_helpers.cli import main as command_line
from glm4_helpers.cli.commands import course
from glm4_helpers.data import read_rows
from glm4_helpers.support.errors import CourseError, SettingError

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
STEMS = (
    "01_environment_setup",
    "02_model_inspection",
    "03_dataset_and_chat_template",
    "04_lora_sft_training",
    "05_choosing_settings",
    "06_before_after_comparison",
)
COURSE = [FOLDER / f"{stem}.ipynb" for stem in STEMS]
SOLUTIONS = [FOLDER / "solutions" / f"{stem}.ipynb" for stem in STEMS]

SECRETS = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{12,})")
MACHINE_PATHS = re.compile(r"(?<![\w.~])/(home|Users|root|tmp|work|var|mnt|opt|venv|private)/|\b[A-Z]:\\\\?Users")
MARKS = {"right": "✅", "wrong": "❌", "not attempted": "⬜"}


def read(path: Path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook) -> list:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def texts(output) -> str:
    """Everything in an output that is text; pictures are left out."""
    parts = [output.get("text", ""), *output.get("traceback", [])]
    parts += [content for kind, content in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join("".join(part) for part in parts)


def printed(notebook) -> str:
    return "\n".join(texts(output) for output in outputs(notebook))


def tagged(notebook, tag: str) -> list:
    return [cell for cell in code_cells(notebook) if tag in cell.metadata.get("tags", [])]


def stem(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


every = pytest.mark.parametrize("path", [*COURSE, *SOLUTIONS], ids=stem)
of_course = pytest.mark.parametrize("path", COURSE, ids=stem)


# Fit to be committed


@every
def test_is_a_valid_notebook_with_ids_of_its_own(path):
    notebook = read(path)
    nbformat.validate(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len(set(ids))
    assert notebook.metadata.kernelspec.name == "python3"


@every
def test_was_run_once_from_top_to_bottom(path):
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


@every
def test_shows_no_error_and_no_warning(path):
    for output in outputs(read(path)):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", texts(output)
        assert "Warning" not in texts(output) and "Traceback" not in texts(output)


@every
def test_names_no_key_no_host_and_no_path_of_a_machine(path):
    notebook = read(path)
    assert not SECRETS.search(path.read_text(encoding="utf-8"))
    shown = printed(notebook)
    assert not MACHINE_PATHS.search(shown), MACHINE_PATHS.search(shown)
    assert socket.gethostname() not in re.findall(r"[\w.-]+", shown) or socket.gethostname() == "localhost"


@every
def test_has_no_widget_state_and_no_timings(path):
    notebook = read(path)
    assert "widgets" not in notebook.metadata
    assert not [output for output in outputs(notebook) if course.WIDGET_VIEW in output.get("data", {})]
    assert not [cell for cell in notebook.cells if "execution" in cell.metadata]


@every
def test_is_small_enough_to_be_shown(path):
    assert path.stat().st_size < 500_000


@every
def test_renders(path):
    from nbconvert import HTMLExporter

    html, _ = HTMLExporter().from_notebook_node(read(path))
    assert "<h1" in html and "application/vnd.jupyter.widget-state+json" not in html


# Made as the course makes them


@every
def test_cells_are_short(path):
    assert max(len(cell.source.splitlines()) for cell in code_cells(read(path))) <= 25


CORE = ("profiles", "data", "chat_format", "models", "held_out", "training", "generation", "evaluation", "plots")
"""The modules of what the course teaches; names from the rooms and from notebook.py are details."""
PLUMBING = re.compile(r"\|---|sys\.path|\.cwd\(\)|runpy")
"""Looking for files, and Markdown tables by hand: nothing that a learner came for."""


@every
def test_plumbing_takes_few_lines(path):
    plumbing = [cell.source for cell in code_cells(read(path)) if PLUMBING.search(cell.source)]
    assert [source for source in plumbing if len(source.splitlines()) > 6] == []


def imported_names(notebook) -> set[str]:
    """Names that a notebook's code imports from the package. There is one style: names, from the package itself."""
    code = "\n".join(re.sub(r"(?m)^\s*[%!].*$", "", cell.source) for cell in code_cells(notebook))
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    modules += [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    assert [module for module in modules if module.startswith("glm4_helpers.")] == []
    from_package = [node for node in nodes if getattr(node, "module", "") == "glm4_helpers"]
    return {name.name for node in from_package for name in node.names}


@every
def test_imports_names_that_it_uses(path):
    notebook = read(path)
    code = "\n".join(cell.source for cell in code_cells(notebook))
    imported = imported_names(notebook)
    assert imported <= set(glm4_helpers.__all__)
    assert {name for name in imported if len(re.findall(rf"\b{name}\b", code)) < 2} == set()


def test_the_package_lists_no_name_that_notebooks_do_not_use():
    used = set().union(*(imported_names(read(path)) for path in [*COURSE, *SOLUTIONS]))
    assert set(glm4_helpers.__all__) - used <= {"CourseError", "home", "doctor"}


@of_course
def test_prose_names_every_core_function_that_is_used(path):
    notebook = read(path)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    prose = re.sub(r"(?ms)^```.*?^```", "", prose)
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`]+`", prose))))
    core = {name for name in imported_names(notebook) if glm4_helpers._HOMES[name] in CORE and name.islower()}
    assert core - named == set()


@of_course
def test_says_more_than_it_runs(path):
    notebook = read(path)
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert 1.0 <= len(prose) / len(code_cells(notebook)) <= 1.7


@of_course
def test_has_title_parameters_and_metrics_in_their_places(path):
    notebook = read(path)
    assert notebook.cells[0].source.startswith("# ")
    assert len(tagged(notebook, "parameters")) == 1
    assert tagged(notebook, "metrics") == [code_cells(notebook)[-1]]


@of_course
def test_has_three_exercises_that_are_not_attempted(path):
    assert printed(read(path)).count(MARKS["not attempted"]) == 3


def test_all_notebooks_find_the_package_in_the_same_way():
    first = {code_cells(read(path))[0].source for path in [*COURSE, *SOLUTIONS]}
    assert len(first) == 1
    assert len(first.pop().splitlines()) <= 5


@pytest.mark.parametrize("path", SOLUTIONS, ids=stem)
def test_solution_is_shown_right(path):
    shown = printed(read(path))
    assert shown.count(MARKS["right"]) == 3
    assert MARKS["wrong"] not in shown and MARKS["not attempted"] not in shown


@pytest.mark.parametrize("name", STEMS)
def test_solution_answers_to_the_checks_of_the_notebook(name):
    def checks(path):
        sources = [cell.source for cell in code_cells(read(path)) if "\ncheck(" in cell.source]
        return sorted(source[source.index("\ncheck(") :].strip() for source in sources)

    assert checks(FOLDER / f"{name}.ipynb") == checks(FOLDER / "solutions" / f"{name}.ipynb")


# They run


@pytest.fixture(scope="module")
def small_course(tmp_path_factory):
    """Makes course folders with the shipped model and few rows, so that training and scoring take seconds."""
    if not (ROOT / "weights" / "glm4-nano" / "model.safetensors").is_file():
        pytest.fail("weights/glm4-nano is not there: git checkout -- weights")

    def make(name: str) -> Path:
        home = tmp_path_factory.mktemp(name) / "the course"
        home.mkdir()
        for linked in ("glm4_helpers", "weights", "images", "pyproject.toml", "README.md"):
            if (ROOT / linked).exists():
                (home / linked).symlink_to(ROOT / linked)
        shutil.copytree(FOLDER, home / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "swanlog"))
        fewer = {"train": 320, "others": 16} if name.startswith("05") else {}  # it trains more than twenty times
        write_few_rows(home / "data", **fewer)
        return home

    return make


def write_few_rows(folder: Path, train: int = 960, others: int = 40) -> None:
    for source in sorted((ROOT / "data").rglob("*.json")):
        rows = json.loads(source.read_text(encoding="utf-8"))
        # Steps through the file, so that every kind of row is there.
        kept = rows[:: max(1, len(rows) // (train if source.name == "train.json" else others))]
        target = folder / source.relative_to(ROOT / "data")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")


def execute(home: Path, name: str, environment: pytest.MonkeyPatch) -> tuple:
    """Run a notebook of that folder; returns it with its outputs and the metrics it recorded."""
    environment.setenv("GLM4_HOME", str(home))
    source, target = home / "notebooks" / f"{name}.ipynb", home / "executed.ipynb"
    course.run_notebook(source, target, "glm4-nano")
    return read(target), course.recorded_metrics(Path(name).name)


@pytest.fixture(scope="module")
def alone(small_course):
    """Each notebook as it ran alone in a fresh folder: folder, executed notebook and metrics; run when asked for."""
    runs = {}

    def run(name: str) -> tuple:
        if name not in runs:
            home = small_course(name)
            with pytest.MonkeyPatch.context() as environment:
                runs[name] = (home, *execute(home, name, environment))
        return runs[name]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", STEMS)
def test_runs_alone_and_records_its_figures(name, alone):
    _, notebook, metrics = alone(name)
    assert 2 <= len(metrics) <= 4
    assert all(isinstance(figure, (int, float, str)) for figure in metrics.values())
    assert printed(notebook).count(MARKS["not attempted"]) == 3
    assert "Warning" not in printed(notebook)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEMS)
def test_every_cell_can_be_run_twice_in_a_row(name, alone, monkeypatch):
    """In the folder where it ran before, so that the adapter trained there is used again."""
    home, _, metrics = alone(name)
    path = home / "notebooks" / f"{name}.ipynb"
    notebook = read(path)
    notebook.cells = [twin for cell in notebook.cells for twin in twice(cell)]
    nbformat.write(notebook, home / "notebooks" / "twice.ipynb")
    executed, _ = execute(home, "twice", monkeypatch)
    assert course.recorded_metrics(name) == pytest.approx(metrics)
    for first, second in zip(*[iter(code_cells(executed))] * 2):
        assert len(first.outputs) == len(second.outputs), first.source


def twice(cell) -> list:
    if cell.cell_type != "code":
        return [cell]
    again = copy.deepcopy(cell)
    again.id = f"{cell.id[:50]}-again"
    return [cell, again]


@pytest.mark.slow
@pytest.mark.parametrize("name", STEMS)
def test_solutions_pass_the_checks(name, alone, monkeypatch):
    home, _, _ = alone(name)
    notebook, _ = execute(home, f"solutions/{name}", monkeypatch)
    assert printed(notebook).count(MARKS["right"]) == 3
    assert MARKS["wrong"] not in printed(notebook)


@pytest.fixture(scope="module", params=[("zh_CN", "GBK"), ("en_US", "ISO-8859-1")], ids=lambda locale: locale[1])
def other_encoding(request, tmp_path_factory):
    """Variables of a locale whose encoding is not UTF-8, as on Windows in Chinese and in Western Europe."""
    language, encoding = request.param
    if not shutil.which("localedef"):
        absent("localedef is not installed: no such locale can be made")
    folder = tmp_path_factory.mktemp("locales")
    name = f"{language}.{encoding}"
    made = subprocess.run(["localedef", "-i", language, "-f", encoding, folder / name], capture_output=True, text=True)
    variables = os.environ | {"LOCPATH": str(folder), "LC_ALL": name, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    variables.pop("PYTHONIOENCODING", None)
    ask = [sys.executable, "-c", "import locale; print(locale.getpreferredencoding())"]
    found = subprocess.run(ask, env=variables, capture_output=True, text=True).stdout.strip()
    if found != encoding:
        absent(f"the locale {name} could not be made: {made.stderr.strip()}")
    return variables


@pytest.mark.slow
def test_files_are_utf8_whatever_the_system_prefers(other_encoding, small_course):
    home = small_course("another encoding")
    command = [sys.executable, "-m", "glm4_helpers", "course", "--only", "03"]
    variables = other_encoding | {"GLM4_HOME": str(home)}
    finished = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, encoding="utf-8", timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert read_rows(home / "outputs" / "03_dataset_and_chat_template" / "mine.json")[1]["output"] == "早上好"


# The runner


def a_notebook(folder: Path, *sources: str) -> Path:
    path = folder / "notebooks" / "01_small.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources]), path)
    return path


@pytest.fixture
def empty_course(tmp_path, monkeypatch):
    for name in ("glm4_helpers", "weights"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("GLM4_HOME", str(tmp_path))
    return tmp_path


def test_runner_leaves_the_notebook_alone_and_prints_its_figures(empty_course, capsys):
    figures = (
        "import json, os\nfrom pathlib import Path\nfolder = Path(os.environ['GLM4_HOME'], 'outputs', 'metrics')\n"
    )
    figures += (
        "folder.mkdir(parents=True, exist_ok=True)\n(folder / '01_small.json').write_text(json.dumps({'loss': 0.125}))"
    )
    path = a_notebook(empty_course, figures)
    committed = path.read_bytes()
    assert command_line.main(["course"]) == 0
    assert path.read_bytes() == committed
    assert (empty_course / "outputs" / "notebooks" / "01_small.ipynb").is_file()
    assert "01_small" in (shown := capsys.readouterr().out) and "loss 0.125" in shown


def test_runner_in_place_stores_outputs_without_paths_timings_and_widgets(empty_course):
    source = "import os\nprint(os.environ['GLM4_HOME'] + '/data')"
    widget = "from IPython.display import display\n"
    widget += f"display({{'{course.WIDGET_VIEW}': {{'model_id': 'x'}}, 'text/plain': 'VBox()'}}, raw=True)"
    path = a_notebook(empty_course, source, widget)
    assert command_line.main(["course", "--in-place"]) == 0
    first, second = read(path).cells
    assert first.outputs[0].text == "data\n"
    assert (first.execution_count, second.execution_count, second.outputs) == (1, 2, [])
    assert "execution" not in first.metadata and "widgets" not in read(path).metadata


def test_runner_says_which_cell_failed_and_keeps_the_committed_notebook(empty_course, capsys):
    path = a_notebook(empty_course, "1 + 1", "raise ValueError('too small')")
    committed = path.read_bytes()
    assert command_line.main(["course", "--in-place"]) == 2
    shown = capsys.readouterr().err
    assert "01_small failed in code cell 2: ValueError: too small" in shown and "Traceback" not in shown
    assert path.read_bytes() == committed


SLOW_CELLS = ("1 + 1", "import time; time.sleep(1.5)")


def test_runner_is_never_silent_for_long(empty_course, capsys, monkeypatch):
    monkeypatch.setattr(course, "LINE_SECONDS", 0.5)
    path = a_notebook(empty_course, *SLOW_CELLS)
    notebook = read(path)
    notebook.cells.insert(1, nbformat.v4.new_markdown_cell("## 4.4 Train\n\nNow the training."))
    nbformat.write(notebook, path)
    assert command_line.main(["course"]) == 0
    assert 1 <= capsys.readouterr().out.count("  code cell 2 of 2, 4.4 Train: ") <= 3


def test_runner_writes_few_lines_into_a_log(empty_course, capsys):
    a_notebook(empty_course, *SLOW_CELLS)
    assert course.LINE_SECONDS >= 60
    assert command_line.main(["course"]) == 0
    assert "code cell" not in capsys.readouterr().out


def test_runner_shows_one_changing_line_in_a_terminal(empty_course, monkeypatch):
    class Terminal(io.StringIO):
        isatty = lambda self: True  # noqa: E731

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    a_notebook(empty_course, *SLOW_CELLS)
    assert command_line.main(["course"]) == 0
    line = next(line for line in terminal.getvalue().split("\n") if "code cell 2 of 2" in line)
    *beats, last = line.split("\r")
    assert {beat.strip() for beat in beats} >= {f"code cell 2 of 2, the beginning: {seconds} s" for seconds in (0, 1)}
    assert last.split()[1] == "s"  # the notebook's own seconds, on the line that was cleared


def test_runner_names_the_numbers_there_are(empty_course):
    with pytest.raises(CourseError, match="no notebooks"):
        course.chosen_notebooks()
    a_notebook(empty_course, "1")
    with pytest.raises(SettingError, match="no notebook 07"):
        course.chosen_notebooks(["7"])
