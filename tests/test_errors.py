"""Errors: what a learner reads on the command line and in a notebook."""

from pathlib import Path

import pytest

from glm4_helpers.support import errors
from glm4_helpers.support.errors import CourseError, DataError, MachineError, ModelError, SettingError

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("kind", [CourseError, DataError, ModelError, SettingError, MachineError])
def test_text_is_the_problem_then_the_fix(kind):
    error = kind("data/train.json is empty.", "Restore it.")
    assert str(error) == "data/train.json is empty.\nFix: Restore it."
    assert (error.problem, error.fix) == ("data/train.json is empty.", "Restore it.")
    assert isinstance(error, CourseError)


def test_outside_ipython_nothing_is_installed():
    assert errors.show_errors_plainly() is False


@pytest.fixture
def shell():
    from IPython.core.interactiveshell import InteractiveShell

    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def test_in_a_notebook_only_course_errors_lose_their_traceback(shell, capsys):
    assert errors.show_errors_plainly() is True
    shell.run_cell("from glm4_helpers.support.errors import DataError\nraise DataError('No rows.', 'Add rows.')")
    shown = capsys.readouterr().out
    assert "DataError: No rows.\nFix: Add rows." in shown
    assert "Traceback" not in shown
    shell.run_cell("1 / 0")
    assert "Traceback" in capsys.readouterr().out


def test_the_traceback_stays_available(shell, capsys):
    errors.show_errors_plainly()
    shell.run_cell(
        "from glm4_helpers.support.errors import DataError\ndef read():\n    raise DataError('No', 'Add')\nread()"
    )
    assert "Traceback" not in capsys.readouterr().out
    shell.run_line_magic("tb", "")
    shown = capsys.readouterr().out
    assert "Traceback" in shown and "raise" in shown


def test_a_real_kernel_reports_the_error_as_those_lines():
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    code = "from glm4_helpers.support.errors import DataError, show_errors_plainly\nshow_errors_plainly()"
    cells = [nbformat.v4.new_code_cell(code), nbformat.v4.new_code_cell("raise DataError('No rows.', 'Add rows.')")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    with pytest.raises(CellExecutionError):
        NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(ROOT)}}).execute()
    (output,) = notebook.cells[1].outputs
    assert output["ename"] == "DataError"
    assert output["traceback"] == ["DataError: No rows.", "Fix: Add rows."]
