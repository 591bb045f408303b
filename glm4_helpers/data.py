"""Rows to conversations, and on to token ids: load, check, count, split, fingerprint, encode.

Files are read in row_files, columns get their meaning in row_shapes, and the chat format is in chat_format. Training
and scoring only use what comes from here.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat_format import encode
from .checks.chat_template import TERMINATOR
from .rows.files import LocatedRow, canonical, located_rows, skipped_files
from .rows.report import EXAMPLES, LACKS, beginning, counts_text, findings, lack_of
from .rows.shapes import KEPT_COLUMNS, Conversation, check_columns, conversation
from .support.errors import DataError, SettingError
from .support.paths import home

if TYPE_CHECKING:
    from datasets import Dataset

    from .profiles import Profile


logger = logging.getLogger(__name__)
Source = str | Path | Sequence[str | Path]
_SKIP = "--set skip_bad_rows=true leaves such rows out"


def read_rows(source: Source, columns: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Rows of a file, of all files below a folder, of a data set on a hub, or of several of these, as they are written.
    ``columns`` renames columns.

    JSON, JSON Lines, CSV, Excel, Parquet, Arrow, any of them compressed or zipped, and folders of ``save_to_disk`` are
    read. Paths count from the working folder, then from the course folder. A hub id such as
    llamafactory/alpaca_gpt4_zh, owner/name:configuration or owner/name:configuration:split is read from
    ``local_copy`` if that is there, else downloaded from Hugging Face, or from ModelScope where the variable GLM4_HUB
    is "modelscope". Raises DataError naming file and row.
    """
    places = located_rows(source)
    for place in places:
        if isinstance(place.row, DataError):
            raise _placed(place.row, place.where)
    return [{(columns or {}).get(name, name): value for name, value in place.row.items()} for place in places]


def to_messages(
    row: Mapping[str, Any], where: str = "", columns: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """One row of any shape in ``row_shapes.SHAPES`` as a list of messages; ``where`` opens the text of errors.

    Alpaca's instruction and input become one user turn, a blank line between them; ``history`` goes before it and
    ``system`` first. Raises DataError for a missing column, a value that is not text or an order of roles that
    can't be learned from.
    """
    return _conversation(LocatedRow(where, row), columns).messages


def load_messages(source: Source, columns: Mapping[str, str] | None = None, skip_bad: bool = False) -> Dataset:
    """All rows of ``source`` as a Dataset with a ``messages`` column (and id, kind, check where rows have them).

    What was left out or ignored is logged; ``load_and_count`` returns it.
    """
    dataset, found = load_and_count(source, columns, skip_bad)
    for line in findings(found):
        logger.warning("%s: %s", source, line)
    return dataset


def load_and_count(
    source: Source, columns: Mapping[str, str] | None = None, skip_bad: bool = False
) -> tuple[Dataset, dict[str, Any]]:
    """``load_messages`` with what was found: counts by name, to which ``rows_report`` gives words.

    ``columns`` maps names of columns to those of the shapes. Rows without an answer stay, so that ``ledger`` can count
    them; ``encode_rows`` drops them. Raises DataError where rows can't be used, with their number and the first of
    them; ``skip_bad`` leaves them out.
    """
    columns = columns or {}
    check_columns(columns)
    places = located_rows(source)
    kept: list[Conversation] = []
    bad: list[DataError] = []
    reasons: dict[str, list[str]] = {}
    for place in places:
        try:
            kept.append(_conversation(place, columns))
        except DataError as error:
            bad.append(error)
            reason = re.sub(r"\d+", "N", error.problem.removeprefix(f"{place.where}: "))
            reasons.setdefault(reason, []).append(place.where)
    if bad and not (skip_bad and kept):
        raise _all_bad(bad, len(places))
    messages = [each.messages for each in kept]
    found = {
        "rows": len(places),
        "shapes": dict(Counter(each.shape for each in kept)),
        "encodings": dict(Counter(place.encoding for place in places if place.encoding)),
        "bad_rows": reasons,
        "skipped_files": skipped_files(source),
        "ignored": dict(Counter(name for each in kept for name in each.ignored)),
        "absent_columns": [name for name in columns if not any(_has(place.row, name) for place in places)],
        "masked_turns": sum(message.get("train") is False for each in messages for message in each),
        "cut_answers": sum(message.get("ended") is False for each in messages for message in each),
        "placeholders": sum(any(_PLACEHOLDER.search(message["content"]) for message in each) for each in messages),
    }
    return _table(source, kept), found


_PLACEHOLDER = re.compile(r"\{\{\s*\w+\s*\}\}")


def _conversation(place: LocatedRow, columns: Mapping[str, str] | None) -> Conversation:
    if isinstance(place.row, DataError):
        raise _placed(place.row, place.where)
    try:
        return conversation(place.row, columns)
    except DataError as error:
        raise _placed(error, place.where) from None


def _placed(error: DataError, where: str) -> DataError:
    """The error with its place in front."""
    first = error.problem[0].lower() if where else error.problem[0].upper()
    return DataError(f"{where}: "[: len(where) and None] + first + error.problem[1:], error.fix)


def _all_bad(bad: Sequence[DataError], rows: int) -> DataError:
    fix = bad[0].fix if len(bad) == rows else f"{bad[0].fix.removesuffix('.')}; or {_SKIP}."
    if len(bad) == 1:
        return DataError(bad[0].problem, fix)
    first = "; ".join(error.problem.removesuffix(".") for error in bad[:EXAMPLES])
    more = f"; and {len(bad) - EXAMPLES} more" if len(bad) > EXAMPLES else ""
    return DataError(f"{len(bad)} of {rows} rows can't be used. {first}{more}.", fix)


def _has(row: Mapping[str, Any] | DataError, name: str) -> bool:
    return isinstance(row, Mapping) and name in map(str.strip, map(str, row))


def _table(source: Source, kept: Sequence[Conversation]) -> Dataset:
    import datasets

    columns: dict[str, list[Any]] = {"messages": [each.messages for each in kept]}
    for name in KEPT_COLUMNS:
        if any(name in each.kept for each in kept):
            columns[name] = [each.kept.get(name) for each in kept]
    try:
        return datasets.Dataset.from_dict(columns)
    except (TypeError, ValueError) as error:  # pyarrow's errors are kinds of these
        raise DataError(
            f"{source}: the columns {', '.join(columns)} don't hold the same kind of value in every row ({error}).",
            "Give each of these columns one type, or leave out those that training does not need.",
        ) from error


def profile_rows(profile: Profile, name: str) -> tuple[Dataset, dict[str, Any]]:
    """``load_and_count`` of a profile's train_data or dev_data, read as its columns and skip_bad_rows say."""
    return load_and_count(data_source(getattr(profile, name)), profile.columns, profile.skip_bad_rows)


def split(dataset: Dataset, dev_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """A training and a held-out part; about ``dev_fraction`` of the rows are held out.

    A row's side depends on its messages and the seed alone: adding rows moves no other, and duplicates stay
    together. Raises SettingError for a fraction outside [0, 1), DataError where one part would be empty.
    """
    if not 0 <= dev_fraction < 1:
        raise SettingError(f"dev_fraction can't be {dev_fraction}.", "Give a value from 0 up to, but not including, 1.")
    held_out = [_position(messages, seed) < dev_fraction for messages in dataset["messages"]]
    train = dataset.select([index for index, out in enumerate(held_out) if not out])
    dev = dataset.select([index for index, out in enumerate(held_out) if out])
    if len(train) == 0 or (dev_fraction > 0 and len(dev) == 0):
        raise DataError(
            f"Holding out {dev_fraction:.1%} of {len(dataset)} rows gives {len(train)} to train on, "
            f"{len(dev)} for dev.",
            "Use more rows or another dev_fraction.",
        )
    return train, dev


def fingerprint(dataset: Dataset) -> str:
    """SHA-256, as 64 hex digits, over the canonical JSON of all rows in order (absent values left out)."""
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(canonical(row) + b"\n")
    return digest.hexdigest()


def encode_rows(tokenizer, dataset: Dataset, max_length: int, terminator: str = TERMINATOR) -> Dataset:
    """Rows as ``input_ids`` and ``labels``, ready for SFTTrainer; what can't be learned from whole is dropped.

    Rows over ``max_length`` tokens and rows without a question or an answer are dropped, never cut, and their
    number is logged; ``encode_and_count`` returns it. Raises DataError where no row is left.
    """
    return encode_and_count(tokenizer, dataset, max_length, terminator)[0]


def encode_and_count(
    tokenizer, dataset: Dataset, max_length: int, terminator: str = TERMINATOR
) -> tuple[Dataset, dict[str, int]]:
    """``encode_rows`` with its counts: rows, kept, too_long, empty_questions, empty_answers, untrained."""
    import datasets

    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    counts = dict.fromkeys(("rows", "kept", *LACKS), 0) | {"rows": len(dataset)}
    examples: dict[str, list[str]] = {}
    longest = 0
    for messages in dataset["messages"]:
        lack = lack_of(messages)
        row = {} if lack else encode(tokenizer, messages, terminator)
        longest = max(longest, len(row.get("input_ids", ())))
        fate = lack or ("too_long" if len(row["input_ids"]) > max_length else "kept")
        counts[fate] += 1
        if fate == "kept":
            for name, values in columns.items():
                values.append(row[name])
        elif len(examples.setdefault(fate, [])) < EXAMPLES:
            examples[fate].append(beginning(messages))
    text = counts_text(counts, examples, max_length)
    if not counts["kept"]:
        fix = "Give rows with questions and answers."
        if counts["too_long"]:
            fix = f"Raise training.max_length (the longest row has {longest} tokens) or give shorter rows."
        raise DataError(f"No row is left to train on. {text}", fix)
    if counts["kept"] < counts["rows"]:
        logger.warning("%s", text)
    return datasets.Dataset.from_dict(columns), counts


def can_be_learned(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the conversation has all of its questions and answers, ends with an answer, and trains one."""
    return not lack_of(messages)


def can_be_asked(messages: Sequence[Mapping[str, str]]) -> bool:
    """Whether the conversation can be learned and its last answer follows a question, or what a tool returned."""
    return can_be_learned(messages) and len(messages) > 1 and messages[-2]["role"] in ("user", "observation")


def data_source(data: str | Sequence[str]) -> Source:
    """A profile's data as `load_messages` takes it: paths count from the course folder, whatever the working folder is;
    the rest are hub ids."""
    if not isinstance(data, str):
        return [data_source(each) for each in data]
    path = home() / data
    return path if path.exists() else data


def _position(messages: Sequence[Mapping[str, str]], seed: int) -> float:
    """A number in [0, 1) that depends on the messages and the seed alone."""
    digest = hashlib.sha256(f"{seed}\n".encode() + canonical(messages)).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
