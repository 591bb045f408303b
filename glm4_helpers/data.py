"""Turns rows into conversations and token ids: loads, checks, counts, splits, fingerprints and encodes them.

The room rows reads files and columns, and chat_format encodes a conversation. Training and scoring get all their rows
from here.
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
    """The unchanged rows of a file, of all files below a folder, of a data set on a hub, or of a list of these.

    Reads JSON, JSON Lines, CSV, Excel, Parquet and Arrow, also compressed or zipped, and folders of `save_to_disk`.
    Paths count from the working folder, then from the course folder. A hub id is owner/name, owner/name:configuration
    or owner/name:configuration:split. It is read from `local_copy` if that exists, otherwise downloaded from Hugging
    Face, or from ModelScope where the variable GLM4_HUB is "modelscope". `columns` renames columns.
    Raises DataError naming file and row.
    Shown in 03, 3.1.
    """
    places = located_rows(source)
    for place in places:
        if isinstance(place.row, DataError):
            raise _placed(place.row, place.where)
    return [{(columns or {}).get(name, name): value for name, value in place.row.items()} for place in places]


def to_messages(
    row: Mapping[str, Any], where: str = "", columns: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """One row of any shape in `rows.shapes.SHAPES` as a list of messages; errors begin with `where`.

    Alpaca's instruction and input become one user turn with a blank line between them; `system` and then `history` come
    before it. Raises DataError for a missing column, a value that is not text, or an order of roles that can't be
    learned.
    Shown in 03, 3.1.
    """
    return _conversation(LocatedRow(where, row), columns).messages


def load_messages(source: Source, columns: Mapping[str, str] | None = None, skip_bad: bool = False) -> Dataset:
    """All rows of `source` as a Dataset with a `messages` column, plus id, kind and check where rows have them.

    Logs what was left out or ignored; `load_and_count` returns it, and says which errors are raised.
    Shown in 03, 3.5.
    """
    dataset, found = load_and_count(source, columns, skip_bad)
    for line in findings(found):
        logger.warning("%s: %s", source, line)
    return dataset


def load_and_count(
    source: Source, columns: Mapping[str, str] | None = None, skip_bad: bool = False
) -> tuple[Dataset, dict[str, Any]]:
    """`load_messages`, and what was found as counts by name; `rows_report` puts them into words.

    `columns` maps column names to those of the shapes. Rows without an answer stay, so that `ledger` can count them;
    `encode_rows` drops them. `skip_bad` leaves out rows that can't be used. Without it they raise DataError, which
    gives their number and names the first of them.
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
    """The error, beginning with its place."""
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
    """`load_and_count` for a profile's `train_data` or `dev_data`, with its `columns` and `skip_bad_rows`."""
    return load_and_count(data_source(getattr(profile, name)), profile.columns, profile.skip_bad_rows)


def split(dataset: Dataset, dev_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """The training rows and the dev rows; about `dev_fraction` of all rows are held out as dev rows.

    A row's side depends only on its messages and the seed: new rows move no other row, and duplicates stay together.
    Raises SettingError for a fraction outside [0, 1), DataError where one part would be empty.
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
    """SHA-256 of the canonical JSON of all rows in order, without absent values, as 64 hex digits."""
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(canonical(row) + b"\n")
    return digest.hexdigest()


def encode_rows(tokenizer, dataset: Dataset, max_length: int, terminator: str = TERMINATOR) -> Dataset:
    """Rows as `input_ids` and `labels`, two lists of ints of the same length per row, ready for SFTTrainer.

    Rows over `max_length` tokens and rows without a question or an answer are dropped, never cut. Their number is
    logged; `encode_and_count` returns it. Raises DataError where no row is left.
    Shown in 01, 1.4.
    """
    return encode_and_count(tokenizer, dataset, max_length, terminator)[0]


def encode_and_count(
    tokenizer, dataset: Dataset, max_length: int, terminator: str = TERMINATOR
) -> tuple[Dataset, dict[str, int]]:
    """`encode_rows`, and its counts: rows, kept, too_long, empty_questions, empty_answers, untrained."""
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
    """Whether no question or answer is empty, the last turn is an answer, and at least one answer is trained."""
    return not lack_of(messages)


def can_be_asked(messages: Sequence[Mapping[str, str]]) -> bool:
    """Whether the conversation can be learned and its last answer follows a question or a tool's result."""
    return can_be_learned(messages) and len(messages) > 1 and messages[-2]["role"] in ("user", "observation")


def data_source(data: str | Sequence[str]) -> Source:
    """A profile's data as `load_messages` takes it: a path below the course folder if it exists, else a hub id."""
    if not isinstance(data, str):
        return [data_source(each) for each in data]
    path = home() / data
    return path if path.exists() else data


def _position(messages: Sequence[Mapping[str, str]], seed: int) -> float:
    """A number in [0, 1) that depends only on the messages and the seed."""
    digest = hashlib.sha256(f"{seed}\n".encode() + canonical(messages)).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
