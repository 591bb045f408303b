"""The errors a learner may meet: each states the problem and the fix.

Showing them without a traceback in notebooks lives here too; the command line does its own printing.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class CourseError(Exception):
    """A problem with a known fix. ``str()`` gives the problem, then a line that starts with "Fix: "."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem, fix)
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.problem}\nFix: {self.fix}"


class DataError(CourseError):
    """Rows or messages that can't be used as they are."""


class ModelError(CourseError):
    """Weights, tokenizer or adapter absent, incomplete or of another model."""


class SettingError(CourseError):
    """A profile, a setting or an argument that is unknown or of the wrong type."""


class MachineError(CourseError):
    """Something this machine lacks: memory, disk, a GPU, a package."""


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def ignore_renamed_names() -> None:
    """Hide what PEFT 0.21 and TRL 1.16 warn of a name that transformers 5.23 has changed: nobody could act on it."""
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)


@contextmanager
def renamed_names_ignored() -> Iterator[None]:
    """`ignore_renamed_names` for the length of a block."""
    with warnings.catch_warnings():
        ignore_renamed_names()
        yield


def show_errors_plainly() -> bool:
    """Show a ``CourseError`` in this notebook as one clear message; ``%tb`` still gives the traceback.

    Other exceptions stay as IPython shows them. Returns False, and does nothing, outside IPython.
    """
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    if shell is None:
        return False
    shell.set_custom_exc((CourseError,), _print_plainly)
    return True


def _print_plainly(shell, kind, error, traceback, tb_offset=None):
    """IPython's handler signature; the returned list is the error output that a kernel sends to the notebook."""
    # IPython leaves these to the handler, and %tb reads them.
    sys.last_type, sys.last_value, sys.last_traceback = kind, error, traceback
    lines = [f"{kind.__name__}: {error.problem}", f"Fix: {error.fix}"]
    shell._showtraceback(kind, error, lines)
    return lines
