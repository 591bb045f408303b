"""What every notebook needs besides its subject: quiet libraries, checks of exercises, tables, its record of figures.

The exercises themselves are in the notebooks, their solutions in notebooks/solutions/.
"""

from __future__ import annotations

import dis
import html
import logging
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .machine.gpus import use_one_gpu
from .support.errors import ignore_renamed_names, show_errors_plainly
from .support.files import write_json
from .support.paths import outputs_dir

if TYPE_CHECKING:
    from IPython.display import Markdown

RIGHT, WRONG, NOT_ATTEMPTED = "right", "wrong", "not attempted"


@dataclass(frozen=True)
class Outcome:
    """What a check found: ``state`` is RIGHT, WRONG or NOT_ATTEMPTED; ``reason`` says what is wrong, if anything."""

    state: str
    reason: str = ""


def check(name: str, value: Any, test: Callable[[Any], Any], hint: str = "") -> None:
    """Print one line on an exercise: right, wrong (and why), or not attempted yet.

    ``value`` is the learner's answer: a number, text, collection or function. ``...`` anywhere in it, and a function
    with nothing but ``...`` or ``pass`` in it, count as not attempted. ``test(value)`` returns something true where
    the answer is right; an assertion in it may say what is wrong, else ``hint`` does. Any error raised by ``test``,
    and so by the learner's function, means wrong: it is shown, never raised.
    """
    outcome = judge(value, test, hint)
    marks = {RIGHT: "✅", WRONG: "❌", NOT_ATTEMPTED: "⬜"}
    reason = f" {outcome.reason}" if outcome.reason else ""
    print(f"{marks[outcome.state]} {name}: {outcome.state}.{reason}")


def judge(value: Any, test: Callable[[Any], Any], hint: str = "") -> Outcome:
    """The outcome that ``check`` prints."""
    if not attempted(value):
        return Outcome(NOT_ATTEMPTED)
    try:
        passed = bool(test(value))
    except AssertionError as error:
        return Outcome(WRONG, str(error).partition("\n")[0] or hint)
    except Exception as error:  # whatever a learner's code may raise
        return Outcome(WRONG, " ".join(part for part in (f"{type(error).__name__}: {error}.", hint) if part))
    return Outcome(RIGHT) if passed else Outcome(WRONG, hint)


def attempted(value: Any) -> bool:
    """Whether anything was put in the place of ``...``."""
    if value is ...:
        return False
    if isinstance(value, Mapping):
        return all(attempted(item) for item in value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(attempted(item) for item in value)
    return not (isinstance(value, types.FunctionType) and _does_nothing(value))


def prepare_notebook() -> None:
    """Use one GPU of several, show the course's own errors with their fix, and hide messages nobody can act on.

    Loading bars go, the trainer's progress stays. Errors and warnings of the libraries stay too, but for these:
    bitsandbytes on a kernel that no CPU profile uses, DeepSpeed on a machine without a GPU, and PEFT 0.21 and
    TRL 1.16 using a name that transformers 5.23 has changed. Raises SettingError as `use_one_gpu` does.
    """
    import datasets
    import transformers

    show_errors_plainly()
    use_one_gpu()  # before anything starts CUDA
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # DeepSpeed sets the level of its logger when it is imported, which would undo a level that is set here.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    ignore_renamed_names()


def write_metrics(notebook: str, figures: Mapping[str, float | int | str]) -> Path:
    """Write a notebook's figures to outputs/metrics/NOTEBOOK.json, in place of those of an earlier run."""
    file = outputs_dir("metrics") / f"{notebook}.json"
    write_json(file, dict(figures))
    return file


def show_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], width: int = 120) -> Markdown:
    """A Markdown table for the end of a cell; line breaks are kept, HTML is shown as text.

    Each cell is cut after `width` characters, and one without text says so.
    """
    from IPython.display import Markdown

    lines = [columns, ["---"] * len(columns), *([_table_cell(value, width) for value in row] for row in rows)]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def _table_cell(value: Any, width: int) -> str:
    text = str(value).strip()
    text = text if len(text) <= width else text[: width - 1] + "…"
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", "<br>") or "(nothing)"


def _stub(_):
    """Does nothing in all the ways that count as not attempted."""
    ...
    pass
    return ...


def _does_nothing(function: types.FunctionType) -> bool:
    """Whether a function only returns None or ``...``: it has no other instructions than this Python gives `_stub`."""
    stubs = [instruction for stub in (_stub, lambda: None) for instruction in dis.get_instructions(stub)]
    instructions = list(dis.get_instructions(function))
    constants = [item.argval for item in instructions if item.opcode in dis.hasconst]
    harmless = {item.opname for item in stubs}
    return {item.opname for item in instructions} <= harmless and all(item in (None, ...) for item in constants)
