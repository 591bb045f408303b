"""What the columns of a row mean: one table of shapes, each a small function from a row to messages.

Rows come from files; messages go to chat_format. A reader takes out of the row what it uses, so what is left over
was ignored, and is reported. Errors begin in lower case: the place of the row goes in front.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..checks.values import checked_text, function_tools, kind
from ..support.errors import DataError, SettingError

Message = dict[str, Any]

KEPT_COLUMNS = ("id", "kind", "check")
"""Columns of the course's own rows that are kept next to ``messages``."""

CALL = "call"
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("observation", "tool", "function", "tool_response"), "observation"),
    **dict.fromkeys(("function_call", "tool_call"), CALL),
}
"""What senders are called in any spelling, and their GLM-4 role; a ``call`` becomes an assistant turn with metadata."""

MASKS = ("weight", "loss", "train", "loss_weight")
"""Keys of a turn (or row) that say whether it is trained: 1 or true, 0 or false."""

_MASK_VALUES = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}

_PREFERENCES = "a preference pair: rows for DPO or reward models"
_OTHER_TRAINING = {
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), _PREFERENCES),
    **dict.fromkeys(("preferred_output", "non_preferred_output"), _PREFERENCES),
    **dict.fromkeys(("image", "images"), "images, and this model reads text only"),
    **dict.fromkeys(("video", "videos"), "videos, and this model reads text only"),
    **dict.fromkeys(("audio", "audios"), "sound, and this model reads text only"),
}


class Conversation(NamedTuple):
    """A row as messages, its shape's name, the columns and message keys that nothing was made of, and KEPT_COLUMNS."""

    shape: str
    messages: list[Message]
    ignored: list[str]
    kept: dict[str, Any]


def conversation(row: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> Conversation:
    """One row of any shape in ``SHAPES`` as messages.

    Column names may be in any case; ``columns`` gives names of one's own their meaning, {"问题": "instruction"}.
    Messages have role and content, and where they need it metadata, ``tools`` (JSON text, on a system message),
    ``"train": False`` and ``"ended": False``. Raises DataError for a row that can't be learned from as it says.
    """
    row = _known_names(row, columns or {})
    _refuse_other_training(row)
    shape = _shape(row)
    ignored: list[str] = []
    trained = _trained(row)
    beside = _system(row)
    messages = _joined_system(beside, SHAPES[shape].read(row, ignored))
    _check_order(messages)
    for message in messages:
        for name in ("content", "metadata", "tools"):
            checked_text(message.get(name, ""), f"the {name} of a message ({message['role']})")
    if trained is False:
        messages = [_untrained(message) for message in messages]
    kept = {name: row.pop(name) for name in KEPT_COLUMNS if name in row}
    return Conversation(shape, messages, [*ignored, *(f"column {name or '(unnamed)'}" for name in row)], kept)


COLUMNS = {"input", "context", "history", "system", "tools", *KEPT_COLUMNS}
"""Columns, besides those of SHAPES, that a setting may give a meaning to."""


def check_columns(columns: Mapping[str, str]) -> None:
    """Raise SettingError where a column is given a meaning that no shape has."""
    known = COLUMNS.union(*(shape.columns for shape in SHAPES.values()))
    for name, meaning in columns.items():
        if meaning not in known:
            problem = f"columns gives {name!r} the unknown meaning {meaning!r}."
            raise SettingError(problem, f"Use one of {', '.join(sorted(known))}.")


def _known_names(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under lower-case names and those of ``columns``, without null and NaN."""
    known: dict[str, Any] = {}
    for name, value in row.items():
        new = columns.get(str(name).strip(), str(name).strip().lower())
        if value is None or value != value:
            continue
        if new in known:
            raise DataError(f"two of its columns are called {new!r}.", "Rename or remove one.")
        known[new] = value
    return known


def _refuse_other_training(row: dict[str, Any]) -> None:
    for name in [name for name in _OTHER_TRAINING if name in row]:
        if row.pop(name) not in ("", [], {}):
            fix = "Remove the row, or the column if the rest is to be learned as it is."
            raise DataError(f"the column {name!r} holds {_OTHER_TRAINING[name]}.", fix)
    for name in ("kto_tag", "label"):
        marked = str(row.get(name)).lower()
        if name == "label" and marked not in ("true", "false"):  # a class, as other tasks have it
            continue
        if _MASK_VALUES.get(marked) is False:
            fix = "Remove such rows; training on good and bad answers is KTO, which TRL has."
            raise DataError(f"it is marked as a bad answer ({name} {marked}).", fix)
        if marked in _MASK_VALUES:
            del row[name]


def _trained(owner: dict[str, Any], where: str = "the row") -> bool | None:
    """What the mask of a turn or row says, taken out of it; None where it has none."""
    said = [_MASK_VALUES.get(str(owner[name]).lower(), name) for name in MASKS if name in owner]
    for unknown in [value for value in said if isinstance(value, str)]:
        fix = "Give 1 (trained) or 0 (not trained), or remove it."
        raise DataError(f"the {unknown} of {where} is {owner[unknown]!r}; turns are trained fully or not at all.", fix)
    for name in MASKS:
        owner.pop(name, None)
    return all(said) if said else None


def _untrained(message: Message) -> Message:
    return {**message, "train": False} if message["role"] == "assistant" else message


# One entry a shape


class Shape(NamedTuple):
    """The columns that a shape can't do without, and what reads them into messages."""

    columns: tuple[str, ...]
    read: Callable[[dict[str, Any], list[str]], list[Message]]


def _pair(question: str, answer: str, extra: str = "") -> Shape:
    """A shape with a column for the question, one for its answer, and maybe one that belongs to the question."""

    def read(row: dict[str, Any], ignored: list[str]) -> list[Message]:
        asked = _text(row, question, "" if extra in row else None)
        more = _text(row, extra, "") if extra else ""
        joined = f"{asked}\n\n{more}" if asked.strip() and more.strip() else asked + more
        turns = [*_history(row, ignored), {"role": "user", "content": joined}]
        return [*turns, {"role": "assistant", "content": _text(row, answer)}]

    return Shape((question, answer), read)


def _turn_list(column: str, called: str) -> Shape:
    return Shape((column,), lambda row, ignored: _messages(_list(row, column), called, ignored))


def _prompt(row: dict[str, Any], ignored: list[str]) -> list[Message]:
    """TRL's prompt and completion: texts, or two lists of messages of which the completion alone is trained."""
    if not isinstance(row["prompt"], (list, tuple)):
        return _pair("prompt", "completion").read(row, ignored)
    prompt = _messages(_list(row, "prompt"), "message {} of prompt", ignored)
    return [*map(_untrained, prompt), *_messages(_list(row, "completion"), "message {} of completion", ignored)]


SHAPES = {
    "Alpaca": _pair("instruction", "output", "input"),
    "ShareGPT": _turn_list("conversations", "turn {} of conversations"),
    "messages": _turn_list("messages", "message {}"),
    "prompt/completion": Shape(("prompt", "completion"), _prompt),
    "prompt/response": _pair("prompt", "response"),
    "query/response": _pair("query", "response"),
    "question/answer": _pair("question", "answer"),
    "question/response": _pair("question", "response"),
    "Dolly": _pair("instruction", "response", "context"),
    "ms-swift": _turn_list("conversation", "turn {} of conversation"),
    "AdvertiseGen": _pair("content", "summary"),
}


_COLUMN_SIGNS = (("问", "指令", "question", "ask"), ("答", "回复", "answer", "reply"))
"""What names of columns hold that are likely to be questions, and answers."""


def _shape(row: Mapping[str, Any]) -> str:
    """The one shape whose columns are all there, else the first whose question is: its reader says what is absent."""
    whole = [name for name, shape in SHAPES.items() if all(column in row for column in shape.columns)]
    if len(whole) > 1:
        raise DataError(f"the row mixes the formats {' and '.join(whole)}.", "Keep the columns of one format.")
    begun = [name for name, shape in SHAPES.items() if shape.columns[0] in row and name != "AdvertiseGen"]
    found = whole or begun or ["Alpaca"] * ("output" in row)
    if found:
        return found[0]
    if "text" in row:
        fix = "Give questions and answers: this course fine-tunes a model to answer."
        raise DataError("it has text alone, as pretraining uses, without question and answer.", fix)
    texts = [name for name, value in row.items() if isinstance(value, str) and name not in KEPT_COLUMNS]
    pair = texts if len(texts) == 2 else ("QUESTION", "ANSWER")
    asked, answered = ([name for name in texts if any(sign in name for sign in signs)] for signs in _COLUMN_SIGNS)
    if any(name.endswith(("。", "？", "！", "?", "!")) for name in row):
        fix = "Name the columns in the first line of a table; in JSON write each row as an object with them."
        raise DataError(f"it has sentences where the names of columns belong ({', '.join(row)[:60]}).", fix)
    raise DataError(
        f"the row has the columns of no known format (its columns: {', '.join(row) or 'none'}).",
        f"Use one of {'; '.join(', '.join(shape.columns) for shape in SHAPES.values())}; "
        "or say what yours mean: "
        f"--set 'columns={{{[*asked, pair[0]][0]}: instruction, {[*answered, pair[1]][0]}: output}}'.",
    )


def _history(row: dict[str, Any], ignored: list[str]) -> list[Message]:
    turns = _list(row, "history", ())
    if turns and isinstance(turns[0], Mapping):
        return _messages(turns, "turn {} of history", ignored)
    messages: list[Message] = []
    for number, pair in enumerate(turns, 1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            fix = 'Write history as [["question", "answer"], ...].'
            raise DataError(f"turn {number} of history is not a pair of texts.", fix)
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


# Turns

_PAIRS_IN_A_TURN = (("human", "assistant"), ("input", "output"))


def _messages(turns: Sequence[Any], called: str, ignored: list[str]) -> list[Message]:
    """Messages of a list of turns: role and content, from and value, or human and assistant in one."""
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        where = called.format(number)
        if not isinstance(turn, Mapping):
            fix = 'Write {"role": "user", "content": "..."}.'
            raise DataError(f"{where} is {kind(turn)} instead of an object.", fix)
        turn = {name: value for name, value in turn.items() if value is not None}
        pair = next((pair for pair in _PAIRS_IN_A_TURN if all(name in turn for name in pair)), None)
        if pair:
            names = zip(("system", "user", "assistant"), ("system", *pair))
            split = [{"role": role, "content": turn.pop(name)} for role, name in names if name in turn]
            split[-1] |= turn  # what else is said, such as a mask, is about the answer
        for each in split if pair else [turn]:
            messages += _turn_messages(each, where, ignored)
    return messages


def _turn_messages(turn: dict[str, Any], where: str, ignored: list[str]) -> list[Message]:
    sender = turn.pop("role", None) or turn.pop("from", None)
    role = ROLES.get(sender.strip().lower()) if isinstance(sender, str) else None
    if role is None:
        raise DataError(f"{where} has the unknown role {sender!r}.", f"Use one of {', '.join(ROLES)}.")
    where = f"{where} ({sender})"
    content = turn.pop("content", None) if "content" in turn else turn.pop("value", None)
    calls = [call for call in (turn.pop("tool_calls", None), turn.pop("function_call", None)) if call]
    tools = function_tools(turn.pop("tools", []))
    trained, ended = _trained(turn, where), turn.pop("ended_by", None) is None
    if role == CALL:
        role, calls, content = "assistant", [content], ""
    elif isinstance(content, (list, tuple)):
        content, parts = _joined(content, where, ignored)
        calls = parts + calls
    if content is None and (calls or tools):
        content = ""
    message: Message = {"role": role, "content": checked_text(content, f"the content of {where}")}
    if metadata := turn.pop("metadata", None):
        message["metadata"] = checked_text(metadata, f"the metadata of {where}")
    if tools:
        message["tools"] = json.dumps(tools, ensure_ascii=False)
    if (tools and role != "system") or (calls and role != "assistant"):
        fix = "Put tools on the system message, and calls on the assistant's."
        raise DataError(f"{where} carries {'tools' if tools else 'calls'}.", fix)
    if trained and role != "assistant":
        raise DataError(f"{where} is to be trained.", "Only the assistant's turns are trained: remove the mark.")
    messages = [message] * bool(content or not calls) + [each for call in calls for each in _calls(call, where)]
    if role == "assistant":
        flags = {"train": False} if trained is False else {}
        messages = [{**each, **flags, **({} if ended else {"ended": False})} for each in messages]
    ignored += [f"message key {name}" for name in turn]
    return messages


def _joined(parts: Sequence[Any], where: str, ignored: list[str]) -> tuple[str, list[Any]]:
    """The text of a content in parts, and the calls among them."""
    text, calls = "", []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        what = part.get("type") if isinstance(part, Mapping) else kind(part)
        value = part.get("text", part.get("value")) if isinstance(part, Mapping) else None
        if what in ("text", "input_text", "output_text"):
            text += checked_text(value, f"a text in {where}")
        elif what == "tool_call":
            calls.append(value)
        elif what == "reasoning":
            ignored.append("message part reasoning")
        else:
            fix = "Remove it: this model reads text only."
            raise DataError(f"the content of {where} has a part of type {what}.", fix)
    return text, calls


def _calls(call: Any, where: str) -> Iterator[Message]:
    """Calls as GLM-4 writes them: the function's name after ``<|assistant|>``, its arguments as the content."""
    try:
        calls = json.loads(call) if isinstance(call, str) else call
        for each in calls if isinstance(calls, list) else [calls]:
            each = each.get("function", each)
            name, arguments = each["name"], each.get("arguments", each.get("parameters", {}))
            arguments = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments or {}
            if not (isinstance(name, str) and name.strip() and "\n" not in name and isinstance(arguments, dict)):
                raise ValueError
            text = json.dumps(arguments, ensure_ascii=False)
            yield {"role": "assistant", "content": text, "metadata": name}
    except (ValueError, AttributeError, KeyError, TypeError):
        fix = 'Write a call as {"name": "...", "arguments": {...}}.'
        raise DataError(f"{where} has a call that is not a function's name with arguments.", fix) from None


def _system(row: dict[str, Any]) -> list[Message]:
    """The row's own system prompt and tools as a message; empty where it has neither."""
    content = _text(row, "system", "") or _text(row, "system_prompt", "")
    tools = function_tools(row.pop("tools", [])) or function_tools(row.pop("functions", []))
    told = {"tools": json.dumps(tools, ensure_ascii=False)} if tools else {}
    return [{"role": "system", "content": content, **told}] if content or told else []


def _joined_system(beside: list[Message], turns: list[Message]) -> list[Message]:
    """The turns with the system prompt and the tools beside them, which join a system message that opens the turns."""
    if not beside or not turns or turns[0]["role"] != "system":
        return [*beside, *turns]
    for name, what in (("content", "system prompt"), ("tools", "list of tools")):
        if beside[0].get(name) and turns[0].get(name):
            raise DataError(f"the row has a {what} in its turns and one beside them.", "Keep one of the two.")
    return [{**beside[0], **{name: value for name, value in turns[0].items() if value}}, *turns[1:]]


def _check_order(messages: Sequence[Message]) -> None:
    first = next((message["role"] for message in messages if message["role"] != "system"), None)
    if first != "user":
        begins = "has no question and no answer" if first is None else f"begins with the {first}'s turn"
        raise DataError(f"the conversation {begins}.", "Begin, after the system message, with a user's turn.")


# Columns


def _text(row: dict[str, Any], name: str, default: str | None = None) -> str:
    value = row.pop(name, default)
    if value is None:
        raise DataError(f"the column {name!r} is missing.", f"Add {name} to the row, or remove the row.")
    return checked_text(value, f"the value of {name!r}")


def _list(row: dict[str, Any], name: str, default: Sequence[Any] | None = None) -> Sequence[Any]:
    """A list, or JSON text of one, as tables have it."""
    value = row.pop(name, default)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(f"the value of {name!r} is not JSON: {error.msg}.", "Write a list of turns.") from error
    if value is None:
        raise DataError(f"the column {name!r} is missing.", f"Add {name} to the row, or remove the row.")
    if value == "":
        return ()
    if not isinstance(value, (list, tuple)):
        raise DataError(f"the value of {name!r} is {kind(value)}, not a list.", f"Give {name} as a list of turns.")
    return value
