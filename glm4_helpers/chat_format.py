"""Turns messages into GLM-4's chat text, token ids and labels. Notebook 03 shows it step by step.

Control tokens and the prefix are read from the model's tokenizer, since GLM-Edge differs from GLM-4. Nothing here reads
files or knows about profiles, models or training; rows become messages in the room rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .checks.chat_template import PREFIX, ROLES, TERMINATOR, ChatFormat, official_tools, read_format, tools_text
from .checks.values import checked_text, function_tools
from .support.errors import DataError, ModelError, SettingError

IGNORE = -100
"""The label that the loss skips."""


class Turn(NamedTuple):
    """One rendered turn: `<|role|>metadata`, a newline, the content (never empty).

    `train` False masks the turn. `ended` False marks an answer that was cut: its text is trained, its end is not.
    """

    role: str
    metadata: str
    content: str
    train: bool = True
    ended: bool = True


def render(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
    """The text that the official GLM-4 template gives for `messages`. It is for reading: never tokenize it again.

    Raises DataError for messages that can't be used.
    Shown in 03, 3.2.
    """
    text = "".join(PREFIX)
    for turn in _turns(messages, official_tools):
        text += f"<|{turn.role}|>{turn.metadata}\n{turn.content}"
    return text + ("<|assistant|>" if add_generation_prompt else "")


def encode(tokenizer, messages: Sequence[Mapping[str, Any]], terminator: str = TERMINATOR) -> dict[str, list[int]]:
    """`input_ids` and `labels` of a complete conversation, two lists of the same length.

    The ids are those of `render`, plus one terminator if the last turn is the assistant's; tools are worded as in the
    tokenizer's own template. Labels cover everything the model writes in an assistant turn: a call's function name
    (`metadata`), the newline, the content and the end. All other labels are IGNORE. The format closes no turn. After an
    answer in the middle, the input therefore has the next role token while the label is the terminator, so that every
    answer learns the same ending. A call that follows text or another call belongs to the same answer, so its
    `<|assistant|>` is learned instead of an ending. A message with `"train": False` is read but not learned; one with
    `"ended": False` learns no ending. Control tokens are placed by id, so no text in a message can forge a turn.

    Raises DataError for messages that can't be used, SettingError for a terminator that is not a stop token, and
    ModelError for a tokenizer with another chat format.
    Shown in 03, 3.3.
    """
    turns = _turns(messages, lambda tools: tools_text(tokenizer, tools))
    chat = read_format(tokenizer)
    end = _terminator_id(chat, terminator)
    ids = list(chat.prefix)
    labels = [IGNORE] * len(ids)
    ending = IGNORE  # the label that the turn before leaves for the next token
    for turn, metadata, body in zip(turns, *_turn_ids(tokenizer, turns)):
        role, text = _role_id(chat, turn.role), metadata + body
        is_answer = turn.role == "assistant"
        ids += [role, *text]
        labels.append(role if is_answer and turn.metadata and ending != IGNORE else ending)
        labels += text if is_answer and turn.train else [IGNORE] * len(text)
        ending = end if is_answer and turn.train and turn.ended else IGNORE
    if turns[-1].role == "assistant" and turns[-1].ended:
        ids.append(end)
        labels.append(ending)
    return {"input_ids": ids, "labels": labels}


def prompt_ids(tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids that ask for the next answer: the conversation, then `<|assistant|>`, as one list.

    In GLM-4 the model itself writes the newline after `<|assistant|>`.
    Raises DataError for messages that can't be used and where the last turn with content is the assistant's.
    Shown in 03, 3.2.
    """
    turns = _turns(messages, lambda tools: tools_text(tokenizer, tools))
    if turns[-1].role == "assistant":
        raise DataError(
            "There is nothing to answer: the last message with content is the assistant's.",
            "End the conversation with a message of role user (or observation).",
        )
    chat = read_format(tokenizer)
    ids = list(chat.prefix)
    for turn, metadata, body in zip(turns, *_turn_ids(tokenizer, turns)):
        ids += [_role_id(chat, turn.role), *metadata, *body]
    end = tokenizer(chat.prompt_end, add_special_tokens=False)["input_ids"] if chat.prompt_end else []
    return [*ids, chat.roles["assistant"], *end]


def _turn_ids(tokenizer, turns: Sequence[Turn]) -> tuple[list[list[int]], list[list[int]]]:
    """Per turn, the ids of its metadata and the ids of its newline and content, all tokenized as plain text."""
    # A tokenizer may merge the newline with what follows, as it does in the official rendering.
    texts = [turn.metadata for turn in turns] + ["\n" + turn.content for turn in turns]
    ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids[: len(turns)], ids[len(turns) :]


def _role_id(chat: ChatFormat, role: str) -> int:
    if role not in chat.roles:
        raise ModelError(
            f"This tokenizer has no token <|{role}|>.", f"Give messages of the roles {', '.join(chat.roles)} only."
        )
    return chat.roles[role]


def _terminator_id(chat: ChatFormat, terminator: str) -> int:
    if terminator not in chat.stops:
        raise SettingError(
            f"The terminator {terminator!r} is not a stop token of this model.",
            f"Use one of {', '.join(chat.stops)}.",
        )
    return chat.stops[terminator]


def _turns(messages: Sequence[Mapping[str, Any]], write_tools: Callable[[list[dict]], str]) -> list[Turn]:
    """Checked turns as they are rendered: tools become a system turn, turns with empty content are dropped."""
    turns: list[Turn] = []
    for number, message in enumerate(_checked_list(messages), 1):
        turns += _message_turns(message, f"message {number}", write_tools)
    if not turns:
        raise DataError(
            "The conversation has no message with content.",
            'Give at least one message such as {"role": "user", "content": "..."}.',
        )
    return turns


def _checked_list(messages: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise DataError(
            f"A conversation must be a list of messages, not {type(messages).__name__}.",
            'Write [{"role": "user", "content": "..."}].',
        )
    return messages


def _message_turns(message: Mapping[str, Any], where: str, write_tools: Callable[[list[dict]], str]) -> list[Turn]:
    """The zero, one or two turns of one message."""
    if not isinstance(message, Mapping):
        raise DataError(
            f"{where.capitalize()} must have a role and a content, but is of type {type(message).__name__}.",
            'Write it as {"role": "user", "content": "..."}.',
        )
    role, tools = message.get("role"), message.get("tools")
    if role not in ROLES:
        raise DataError(f"{where.capitalize()} has the unknown role {role!r}.", f"Use one of {', '.join(ROLES)}.")
    if tools is not None and role != "system":
        raise DataError(f"{where.capitalize()} ({role}) carries tools.", "Put tools on the system message.")
    written = "" if tools is None else write_tools(_placed_tools(tools, where))
    told = [Turn("system", "", written)] if written else []
    content, metadata = message.get("content"), message.get("metadata")
    content = "" if content is None and tools is not None else checked_text(content, f"the content of {where} ({role})")
    metadata = "" if metadata is None else checked_text(metadata, f"the metadata of {where} ({role})")
    flags = (message.get("train") is not False, message.get("ended") is not False)
    return [*told, Turn(role, metadata, content, *flags)] if content else told


def _placed_tools(tools: Any, where: str) -> list[dict[str, Any]]:
    try:
        return function_tools(tools)
    except DataError as error:
        raise DataError(f"{where.capitalize()}: {error.problem}", error.fix) from None
