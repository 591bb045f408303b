"""Rows from a file or a hub to conversations, and on to token ids: read, check, count, split, fingerprint, encode.

The chat format itself is in chat_format; training and scoring only use what comes from here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterable, Mapping, NamedTuple, Sequence

from .chat_format import IGNORE, TERMINATOR, encode, plain_messages
from .errors import CourseError, DataError, MachineError, SettingError, first_line
from .paths import data_dir, home

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "observation": "observation", "tool": "observation",
}  # fmt: skip

KEPT_COLUMNS = ("id", "kind", "check")
"""Columns of the course's own rows that stay beside ``messages``."""

_FORMATS = {"messages": "messages", "conversations": "ShareGPT", "instruction": "Alpaca", "output": "Alpaca"}


class LocatedRow(NamedTuple):
    """A row and where it stands, such as "data/train.jsonl, row 3 (line 4)"."""

    where: str
    row: Mapping[str, Any]


def read_rows(source: str | Path) -> list[dict[str, Any]]:
    """Rows of a JSON or JSONL file, of all such files in a folder, or of a data set on a hub.

    Paths count from the working folder, then from the course folder. A hub id such as llamafactory/alpaca_gpt4_zh
    is read from ``local_copy`` if that is there, else downloaded from Hugging Face, or from ModelScope where the
    variable GLM4_HUB is "modelscope". Raises DataError naming file and row.
    """
    return [dict(located.row) for located in _located_rows(source)]


def to_messages(row: Mapping[str, Any], where: str = "") -> list[dict[str, str]]:
    """One Alpaca, ShareGPT or ``messages`` row as a list of messages; ``where`` opens the text of errors.

    Alpaca's instruction and input become one user turn, a blank line between them; ``history`` goes before it and
    ``system`` first. Raises DataError for a missing column, a value that is not text or an order of roles that
    can't be learned from.
    """
    prefix = f"{where}: " if where else ""
    convert = {"messages": _from_messages, "ShareGPT": _from_sharegpt, "Alpaca": _from_alpaca}
    try:
        messages = plain_messages(convert[_format(row)](row))
        _check_order(messages)
    except DataError as error:
        problem = error.problem[0].lower() + error.problem[1:] if prefix else error.problem
        raise DataError(prefix + problem, error.fix) from None
    return messages


def load_messages(source: str | Path) -> Dataset:
    """All rows of ``source`` as a Dataset with a ``messages`` column (and id, kind, check where rows have them).

    Rows without an answer stay, so that ``ledger`` can count them; ``encode_rows`` drops them.
    Raises DataError as ``read_rows`` and ``to_messages`` do, and where rows are of different formats.
    """
    import datasets

    rows = _located_rows(source)
    _check_one_format(rows)
    columns: dict[str, list[Any]] = {"messages": [to_messages(row, where) for where, row in rows]}
    for name in KEPT_COLUMNS:
        if any(row.get(name) is not None for _, row in rows):
            columns[name] = [row.get(name) for _, row in rows]
    try:
        return datasets.Dataset.from_dict(columns)
    except (TypeError, ValueError) as error:  # pyarrow's errors are kinds of these
        raise DataError(
            f"{source}: the columns {', '.join(columns)} don't hold the same kind of value in every row ({error}).",
            "Give each of these columns one type, or leave out those that training does not need.",
        ) from error


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
            f"Holding out {dev_fraction:.1%} of {len(dataset)} rows gives {len(train)} to train on, {len(dev)} for dev.",
            "Use more rows or another dev_fraction.",
        )
    return train, dev


def fingerprint(dataset: Dataset) -> str:
    """SHA-256, as 64 hex digits, over the canonical JSON of all rows in order (absent values left out)."""
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(_canonical(row) + b"\n")
    return digest.hexdigest()


def ledger(tokenizer, dataset: Dataset, max_lengths: Sequence[int] = (512, 1024, 2048)) -> dict[str, Any]:
    """What training would meet: counts of rows, over the whole of ``dataset``, before anything is dropped.

    ``duplicates`` are rows equal to an earlier one. For each of ``max_lengths`` (tokens) the rows with question and
    answer are ``fit``, ``lose_end`` (cutting would take at least the terminator) or ``lose_answer`` (at most the
    newline of the last answer would be left). ``encode_rows`` drops the latter two and the empty ones.
    """
    copies = Counter(_canonical(messages) for messages in dataset["messages"])
    empty = Counter(_emptiness(messages) for messages in dataset["messages"])
    sizes = [_sizes(tokenizer, messages) for messages in dataset["messages"] if not _emptiness(messages)]
    return {
        "rows": len(dataset),
        "duplicates": len(dataset) - len(copies),
        "empty_questions": empty["question"],
        "empty_answers": empty["answer"],
        "tokens": sum(length for length, _ in sizes),
        "longest": max((length for length, _ in sizes), default=0),
        "by_max_length": [_fates(sizes, max_length) for max_length in max_lengths],
    }


def encode_rows(tokenizer, dataset: Dataset, max_length: int, terminator: str = TERMINATOR) -> Dataset:
    """Rows as ``input_ids`` and ``labels``, ready for SFTTrainer; what can't be learned from whole is dropped.

    Rows over ``max_length`` tokens and rows without a question or an answer are dropped, never cut, and their
    number is logged; ``encode_and_count`` returns it. Raises DataError where no row is left.
    """
    encoded, counts = encode_and_count(tokenizer, dataset, max_length, terminator)
    if counts["kept"] < counts["rows"]:
        logger.warning("%s", _counts_text(counts, max_length))
    return encoded


def encode_and_count(
    tokenizer, dataset: Dataset, max_length: int, terminator: str = TERMINATOR
) -> tuple[Dataset, dict[str, int]]:
    """``encode_rows`` with its counts: rows, kept, too_long, empty_questions, empty_answers."""
    import datasets

    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    counts = {"rows": len(dataset), "kept": 0, "too_long": 0, "empty_questions": 0, "empty_answers": 0}
    longest = 0
    for messages in dataset["messages"]:
        emptiness = _emptiness(messages)
        row = {} if emptiness else encode(tokenizer, messages, terminator)
        longest = max(longest, len(row.get("input_ids", ())))
        fate = f"empty_{emptiness}s" if emptiness else "too_long" if len(row["input_ids"]) > max_length else "kept"
        counts[fate] += 1
        if fate == "kept":
            for name, values in columns.items():
                values.append(row[name])
    if not counts["kept"]:
        _raise_nothing_left(counts, max_length, longest)
    return datasets.Dataset.from_dict(columns), counts


def can_be_learned(messages: Sequence[Mapping[str, str]]) -> bool:
    """Whether the conversation has all of its questions and answers, and ends with an answer."""
    return not _emptiness(messages)


def can_be_asked(messages: Sequence[Mapping[str, str]]) -> bool:
    """Whether the conversation can be learned and its last answer follows a question, or what a tool returned."""
    return can_be_learned(messages) and len(messages) > 1 and messages[-2]["role"] in ("user", "observation")


def data_source(data: str) -> str | Path:
    """A profile's data as `load_messages` takes it: paths count from the course folder, whatever the working folder is;
    the rest are hub ids."""
    path = home() / data
    return path if path.exists() else data


def local_copy(hub_id: str) -> Path:
    """Where a downloaded data set lands: data/NAME.json, NAME being the part of the hub id after the slash."""
    return data_dir() / _copy_name(hub_id)


def _copy_name(hub_id: str) -> str:
    return f"{hub_id.rpartition('/')[2]}.json"


# --- reading ---------------------------------------------------------------------------------------------------------


def _located_rows(source: str | Path) -> list[LocatedRow]:
    """Non-empty list of rows, every one a dict."""
    path = _find(source)
    if path is None:
        rows = [LocatedRow(f"{source}, row {number}", row) for number, row in enumerate(_hub_rows(str(source)), 1)]
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
        rows = [row for file in files for row in _file_rows(file, f"{source}/{file.name}")]
    else:
        rows = _file_rows(path, str(source))
    if not rows:
        raise DataError(f"{source} holds no rows.", "Give a JSON or JSONL file with at least one row.")
    return rows


def _find(source: str | Path) -> Path | None:
    """The file or folder that ``source`` names; None if it is a hub id without a local copy."""
    path = Path(source).expanduser()
    candidates = [path] if path.is_absolute() else [path, *_in_home(path)]
    is_hub_id = _looks_like_hub_id(source, candidates)
    if is_hub_id:
        candidates += _in_home(Path("data") / _copy_name(str(source)))
    for candidate in candidates:
        if candidate.exists():
            return candidate
    if is_hub_id:
        return None
    raise DataError(
        f"{source} was not found.",
        "Check the path. The course's own rows come with the clone; `python -m nano data` writes them.",
    )


def _in_home(path: Path) -> list[Path]:
    try:
        return [home() / path]
    except CourseError:  # outside a clone, paths count from the working folder alone
        return []


def _looks_like_hub_id(source: str | Path, candidates: Iterable[Path]) -> bool:
    """OWNER/NAME, unless OWNER is a folder at hand or NAME is that of a file."""
    if not isinstance(source, str) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        return False
    return not source.endswith((".json", ".jsonl")) and not any(path.parent.is_dir() for path in candidates)


def _file_rows(path: Path, shown: str) -> list[LocatedRow]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{shown} can't be read: {error.strerror}.", "Check the path and its permissions.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{shown} is not UTF-8 text (byte {error.start}).", "Save the file as UTF-8.") from error
    if not text.strip():
        raise DataError(f"{shown} is empty.", "Give a JSON or JSONL file with at least one row.")
    return _jsonl_rows(text, shown) if path.suffix == ".jsonl" else _json_rows(text, shown)


def _json_rows(text: str, shown: str) -> list[LocatedRow]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{shown} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}.",
            "Correct the file there; if it holds one object a line, name it .jsonl.",
        ) from error
    if not isinstance(rows, list):
        raise DataError(
            f"{shown} holds {_kind(rows)} instead of a list of rows.", "Put the rows in a list: [{...}, {...}]."
        )
    return [_located(row, f"{shown}, row {number}") for number, row in enumerate(rows, 1)]


def _jsonl_rows(text: str, shown: str) -> list[LocatedRow]:
    rows: list[LocatedRow] = []
    # Only "\n" ends a line here: str.splitlines would also cut at the U+2028 that JSON strings may hold.
    for line_number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{shown}, row {len(rows) + 1} (line {line_number})"
        try:
            rows.append(_located(json.loads(line), where))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where} is not JSON: {error.msg} in column {error.colno}.",
                "Write one JSON object a line; if the file is one JSON list, name it .json.",
            ) from error
    return rows


def _located(row: Any, where: str) -> LocatedRow:
    if not isinstance(row, dict):
        raise DataError(
            f"{where} is {_kind(row)} instead of an object.", 'Write each row as {"instruction": "...", ...}.'
        )
    return LocatedRow(where, row)


def _hub_rows(hub_id: str) -> list[dict[str, Any]]:
    hub = os.environ.get("GLM4_HUB") or "huggingface"
    if hub not in ("huggingface", "modelscope"):
        raise SettingError(f"GLM4_HUB is {hub!r}.", "Set it to huggingface or modelscope, or unset it.")
    title = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}[hub]
    load = {"huggingface": _from_hugging_face, "modelscope": _from_modelscope}[hub]
    try:
        return load(hub_id)
    except CourseError:
        raise
    except Exception as error:  # the hubs raise dozens of kinds: network, absent, gated, unreadable
        reason = first_line(error)
        raise DataError(
            f"{hub_id} is no file here and could not be read from {title}: {reason}",
            "Check name and network, set GLM4_HUB to the other hub (huggingface, modelscope), "
            f"or save it as data/{_copy_name(hub_id)} in the course folder.",
        ) from error


def _from_hugging_face(hub_id: str) -> list[dict[str, Any]]:
    import datasets

    return datasets.load_dataset(hub_id, split="train").to_list()


def _from_modelscope(hub_id: str) -> list[dict[str, Any]]:
    """The rows of the JSON files in the repository. ModelScope's own reader needs an older datasets package than ours."""
    try:
        from modelscope.hub.snapshot_download import dataset_snapshot_download
    except ImportError as error:
        raise MachineError(
            f"GLM4_HUB is modelscope, but the package modelscope can't be imported: {first_line(error)}.",
            'Install it with python -m pip install -e ".[modelscope]", or unset GLM4_HUB.',
        ) from error
    folder = Path(dataset_snapshot_download(hub_id, allow_patterns=["*.json", "*.jsonl"]))
    files = sorted(file for file in folder.rglob("*.json*") if not file.name.startswith(("dataset_info", ".")))
    return [located.row for file in files for located in _file_rows(file, f"{hub_id}/{file.name}")]


# --- rows to messages ------------------------------------------------------------------------------------------------


def _format(row: Mapping[str, Any]) -> str:
    """Alpaca, ShareGPT or messages, by the columns that have a value."""
    found = sorted({name for column, name in _FORMATS.items() if row.get(column) is not None})
    if len(found) > 1:
        raise DataError(f"The row mixes the formats {' and '.join(found)}.", "Keep the columns of one format.")
    if not found:
        columns = ", ".join(map(str, row)) or "none"
        raise DataError(
            f"The row has none of the columns instruction, conversations and messages (its columns: {columns}).",
            "Use Alpaca (instruction, input, output), ShareGPT (conversations) or messages.",
        )
    return found[0]


def _check_one_format(rows: Sequence[LocatedRow]) -> None:
    """All rows of the first row's format. Rows of no format are left to ``to_messages``, which says more."""
    first = None
    for where, row in rows:
        found = {name for column, name in _FORMATS.items() if row.get(column) is not None}
        first = first or (where, found)
        if found and first[1] and found != first[1]:
            raise DataError(
                f"{where} is {'/'.join(sorted(found))}, but {first[0]} is {'/'.join(sorted(first[1]))}.",
                "Keep one format (Alpaca, ShareGPT or messages) in a file.",
            )


def _from_alpaca(row: Mapping[str, Any]) -> list[dict[str, str]]:
    instruction, output = _column(row, "instruction"), _column(row, "output")
    extra = _column(row, "input", "")
    question = f"{instruction}\n\n{extra}" if instruction.strip() and extra.strip() else instruction + extra
    messages = _system(row)
    for number, pair in enumerate(_list(row, "history", ()), 1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(
                f"Turn {number} of history is not a pair of texts.", 'Write history as [["question", "answer"], ...].'
            )
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": output}]


def _from_sharegpt(row: Mapping[str, Any]) -> list[dict[str, str]]:
    messages = _system(row)
    for number, turn in enumerate(_list(row, "conversations"), 1):
        sender = turn.get("from") if isinstance(turn, Mapping) else None
        if not isinstance(sender, str) or sender not in SHAREGPT_ROLES:
            raise DataError(
                f"Turn {number} of conversations comes from {sender!r}.",
                f"Write turns as {{\"from\": ..., \"value\": ...}} with from one of {', '.join(SHAREGPT_ROLES)}.",
            )
        if not isinstance(turn.get("value"), str):
            raise DataError(
                f"The value of turn {number} of conversations is {_kind(turn.get('value'))}, not text.",
                "Give value as a string.",
            )
        messages.append({"role": SHAREGPT_ROLES[sender], "content": turn["value"]})
    return messages


def _from_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    beside, messages = _system(row), list(_list(row, "messages"))
    first = messages[0] if messages and isinstance(messages[0], Mapping) else {}
    if not beside or first.get("role") != "system":
        return [*beside, *messages]
    if _column(row, "system", ""):
        raise DataError("The row has a system prompt in messages and one beside them.", "Keep one of the two.")
    return [{**first, "tools": beside[0]["tools"]}, *messages[1:]]


def _system(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The row's own system prompt and tools as a message; empty where it has neither."""
    content, tools = _column(row, "system", ""), _tools(row)
    if tools:
        return [{"role": "system", "content": content, "tools": tools}]
    return [{"role": "system", "content": content}] if content else []


def _tools(row: Mapping[str, Any]) -> list[Any]:
    """The functions that the row offers: a list, or, as ShareGPT files have it, JSON text of one."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise DataError(f"The value of 'tools' is not JSON: {error.msg}.", "Give tools as a list of functions.") from error
    if tools and not isinstance(tools, list):
        raise DataError(f"The value of 'tools' is {_kind(tools)}, not a list.", "Give tools as a list of functions.")
    return tools or []


def _column(row: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = row.get(name)
    if value is None:
        value = default
    if value is None:
        raise DataError(f"The column {name!r} is missing.", f"Add {name} to the row, or remove the row.")
    if not isinstance(value, str):
        raise DataError(f"The value of {name!r} is {_kind(value)}, not text.", f"Give {name} as a string.")
    return value


def _list(row: Mapping[str, Any], name: str, default: Sequence[Any] | None = None) -> Sequence[Any]:
    value = default if row.get(name) is None else row[name]
    if not isinstance(value, (list, tuple)):
        raise DataError(f"The value of {name!r} is {_kind(value)}, not a list.", f"Give {name} as a list of turns.")
    return value


def _check_order(messages: Sequence[Mapping[str, str]]) -> None:
    first = next((message["role"] for message in messages if message["role"] != "system"), None)
    if first != "user":
        begins = "has no question and no answer" if first is None else f"begins with the {first}'s turn"
        raise DataError(f"The conversation {begins}.", "Begin, after the system message, with a user's turn.")


def _kind(value: Any) -> str:
    """What a JSON value is, in plain words."""
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), f"of type {type(value).__name__}")


# --- counting --------------------------------------------------------------------------------------------------------


def _emptiness(messages: Sequence[Mapping[str, str]]) -> str:
    """The side, question or answer, that has a blank turn or lacks its last one; else an empty string."""
    if any(message["role"] == "user" and not message["content"].strip() for message in messages):
        return "question"
    blank = any(message["role"] == "assistant" and not message["content"].strip() for message in messages)
    return "answer" if blank or messages[-1]["role"] != "assistant" else ""


def _sizes(tokenizer, messages: Sequence[Mapping[str, str]]) -> tuple[int, int]:
    """Tokens of the whole row, and tokens before its last answer."""
    labels = encode(tokenizer, messages)["labels"]
    return len(labels), max(index for index, label in enumerate(labels) if label == IGNORE) + 1


def _fates(sizes: Sequence[tuple[int, int]], max_length: int) -> dict[str, int]:
    over = [before for length, before in sizes if length > max_length]
    lose_answer = sum(max_length <= before + 1 for before in over)
    return {
        "max_length": max_length,
        "fit": len(sizes) - len(over),
        "lose_end": len(over) - lose_answer,
        "lose_answer": lose_answer,
    }


def _counts_text(counts: Mapping[str, int], max_length: int) -> str:
    return (
        f"{counts['rows'] - counts['kept']} of {counts['rows']} rows dropped: "
        f"{counts['too_long']} longer than {max_length} tokens, {counts['empty_answers']} without an answer, "
        f"{counts['empty_questions']} without a question."
    )


def _raise_nothing_left(counts: Mapping[str, int], max_length: int, longest: int) -> None:
    fix = "Give rows with questions and answers."
    if counts["too_long"]:
        fix = f"Raise training.max_length (the longest row has {longest} tokens) or give shorter rows."
    raise DataError(f"No row is left to train on. {_counts_text(counts, max_length)}", fix)


def _canonical(value: Any) -> bytes:
    """JSON that does not depend on key order nor on the nulls that a table puts where a row has no value."""
    return json.dumps(without_nulls(value), ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def without_nulls(value: Any) -> Any:
    """The value without keys that hold null, as it was before a table gave it the columns of other rows."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


def _position(messages: Sequence[Mapping[str, str]], seed: int) -> float:
    """A number in [0, 1) that depends on the messages and the seed alone."""
    digest = hashlib.sha256(f"{seed}\n".encode() + _canonical(messages)).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
