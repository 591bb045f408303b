"""The GLM-4 chat format: messages to text, to token ids and to labels. Shown step by step in notebook 03.

Nothing here reads files or knows about profiles, models or training; rows become messages in ``datasets``.
"""

from __future__ import annotations

import json
from typing import Any, Mapping, NamedTuple, Sequence

from .errors import DataError, ModelError, SettingError

IGNORE = -100
"""The label that the loss skips."""

ROLES = ("system", "user", "assistant", "observation")

SPECIAL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip
"""The special tokens of the GLM-4 tokenizer in the order of their ids (151329 to 151342 there)."""

PREFIX = ("[gMASK]", "<sop>")
TERMINATOR = "<|endoftext|>"

STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")
"""Any of these ends an answer: GlmConfig's default eos list."""

TOOLS_HEADER = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)
TOOLS_FOOTER = "在调用上述函数时，请使用 Json 格式表示调用的参数。"

# transformers renders with trim_blocks, which drops a newline right after a block tag. Every newline of the format
# is therefore a string inside {{ }}, and the comments and tags below can stand on lines of their own.
CHAT_TEMPLATE = (
    """\
{{ '[gMASK]<sop>' }}
{%- for item in messages %}
    {%- if item['tools'] is defined and item['tools'] is not none %}
        {{- '<|system|>\\n' + HEADER }}
        {%- for tool in item['tools'] %}
            {{- '\\n## ' + tool['function']['name'] + '\\n\\n' }}
            {{- tool['function'] | tojson(indent=4) }}
            {{- '\\n' + FOOTER }}
        {%- endfor %}
    {%- endif %}
    {%- if item['content'] %}
        {{- '<|' + item['role'] + '|>' + (item['metadata'] or '') }}
        {%- if item['role'] == 'assistant' %}
            {%- generation %}
                {{- '\\n' + item['content'] }}
                {%- if loop.last and not add_generation_prompt %}
                    {{- '<|endoftext|>' }}
                {%- endif %}
            {%- endgeneration %}
        {%- else %}
            {{- '\\n' + item['content'] }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
    .replace("HEADER", json.dumps(TOOLS_HEADER, ensure_ascii=False))
    .replace("FOOTER", json.dumps(TOOLS_FOOTER, ensure_ascii=False))
)
"""Our Jinja template with generation markers: the text of ``render``, plus the terminator after a last answer."""


class Turn(NamedTuple):
    """One rendered turn: ``<|role|>metadata``, a newline, the content (never empty)."""

    role: str
    metadata: str
    content: str


def render(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
    """The text that the official GLM-4 template gives for ``messages``. To look at; never tokenize it again.

    Raises DataError for messages that are not usable.
    """
    text = "".join(PREFIX)
    for turn in _turns(messages):
        text += f"<|{turn.role}|>{turn.metadata}\n{turn.content}"
    return text + ("<|assistant|>" if add_generation_prompt else "")


def encode(tokenizer, messages: Sequence[Mapping[str, Any]], terminator: str = TERMINATOR) -> dict[str, list[int]]:
    """Token ids and labels of a whole conversation, as two lists of the same length.

    The ids are those of ``render``, plus one terminator after a last assistant turn. Labels cover the newline, the
    content and the end of every assistant turn; all else is IGNORE. The format closes no turn, so after an answer
    in the middle the input keeps the next role token while the label there is the terminator: every answer learns
    the same ending. Control tokens are placed by id, so no text in a message can forge a turn.

    Raises DataError for unusable messages, ModelError for a tokenizer without GLM-4's special tokens.
    """
    turns = _turns(messages)
    control = _control_ids(tokenizer)
    end = _terminator_id(control, terminator)
    ids = [control[token] for token in PREFIX]
    labels = [IGNORE] * len(ids)
    after_answer = False
    for turn, metadata, body in zip(turns, *_turn_ids(tokenizer, turns)):
        ids += [control[f"<|{turn.role}|>"], *metadata, *body]
        labels += [end if after_answer else IGNORE] + [IGNORE] * len(metadata)
        after_answer = turn.role == "assistant"
        labels += body if after_answer else [IGNORE] * len(body)
    if after_answer:
        ids.append(end)
        labels.append(end)
    return {"input_ids": ids, "labels": labels}


def prompt_ids(tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids that ask for the next answer: the conversation, then ``<|assistant|>`` (the model emits the newline).

    Raises DataError for unusable messages and where the last turn with content is the assistant's own.
    """
    turns = _turns(messages)
    if turns[-1].role == "assistant":
        raise DataError(
            "There is nothing to answer: the last message with content is the assistant's.",
            "End the conversation with a message of role user (or observation).",
        )
    control = _control_ids(tokenizer)
    ids = [control[token] for token in PREFIX]
    for turn, metadata, body in zip(turns, *_turn_ids(tokenizer, turns)):
        ids += [control[f"<|{turn.role}|>"], *metadata, *body]
    return ids + [control["<|assistant|>"]]


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The same conversation with role, content and metadata only; tools become the system text they are rendered as.

    So it fits a table column, where tools of different shapes would not. Empty messages stay. Raises DataError.
    """
    plain: list[dict[str, str]] = []
    for number, message in enumerate(_checked_list(messages), 1):
        plain += [_as_message(turn) for turn in _message_turns(message, f"message {number}", keep_empty=True)]
    return plain


def stop_ids(tokenizer) -> list[int]:
    """The ids of STOP_TOKENS in this tokenizer. Raises ModelError for one without them."""
    control = _control_ids(tokenizer)
    return [control[token] for token in STOP_TOKENS]


def _turn_ids(tokenizer, turns: Sequence[Turn]) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of every turn's metadata and of its newline with content, all tokenized as plain text."""
    # The newline goes with the content: a tokenizer may merge it with what follows, as the official rendering does.
    texts = [turn.metadata for turn in turns] + ["\n" + turn.content for turn in turns]
    ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids[: len(turns)], ids[len(turns) :]


def _control_ids(tokenizer) -> dict[str, int]:
    """Ids of the added tokens; every control token of the format is among them."""
    control = tokenizer.get_added_vocab()
    needed = [*PREFIX, *STOP_TOKENS, *(f"<|{role}|>" for role in ROLES)]
    missing = [token for token in dict.fromkeys(needed) if token not in control]
    if missing:
        raise ModelError(
            f"This tokenizer lacks the special tokens {', '.join(missing)}.",
            "Load the tokenizer of a GLM-4 model, such as the shipped weights/glm4-nano.",
        )
    return control


def _terminator_id(control: Mapping[str, int], terminator: str) -> int:
    if terminator not in STOP_TOKENS:
        raise SettingError(
            f"The terminator {terminator!r} is not a stop token of GLM-4.",
            f"Use one of {', '.join(STOP_TOKENS)}.",
        )
    return control[terminator]


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Checked turns as they are rendered: tools become a system turn, turns with empty content are gone."""
    turns: list[Turn] = []
    for number, message in enumerate(_checked_list(messages), 1):
        turns += _message_turns(message, f"message {number}")
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


def _as_message(turn: Turn) -> dict[str, str]:
    message = {"role": turn.role, "content": turn.content}
    return {**message, "metadata": turn.metadata} if turn.metadata else message


def _message_turns(message: Mapping[str, Any], where: str, keep_empty: bool = False) -> list[Turn]:
    """The zero, one or two turns of one message."""
    if not isinstance(message, Mapping):
        raise DataError(
            f"{where.capitalize()} must have a role and a content, but is of type {type(message).__name__}.",
            'Write it as {"role": "user", "content": "..."}.',
        )
    role, tools = message.get("role"), message.get("tools")
    if role not in ROLES:
        raise DataError(f"{where.capitalize()} has the unknown role {role!r}.", f"Use one of {', '.join(ROLES)}.")
    content = _text(message, "content", where, optional=tools is not None)
    turns = [Turn(role, _text(message, "metadata", where, optional=True), content)] if content else []
    if keep_empty and not content and tools is None:
        turns = [Turn(role, "", "")]
    if tools is None:
        return turns
    if role != "system":
        raise DataError(f"{where.capitalize()} ({role}) carries tools.", "Put tools on the system message.")
    return [Turn("system", "", _tools_text(tools, where)), *turns]


def _text(message: Mapping[str, Any], key: str, where: str, optional: bool) -> str:
    value = message.get(key)
    if value is None and optional:
        return ""
    if value is None:
        raise DataError(f"{where.capitalize()} ({message['role']}) has no {key}.", f"Give {key} as a string.")
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"The {key} of {where} ({message['role']}) is not text but {kind}.", f"Give {key} as a string.")
    return value


def _tools_text(tools: Any, where: str) -> str:
    """The system text that lists function tools, as the official template words it."""
    text = TOOLS_HEADER
    for tool in tools if isinstance(tools, (list, tuple)) else [tools]:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{where.capitalize()} has a tool that is not a named function.",
                'Write tools as [{"type": "function", "function": {"name": "...", ...}}].',
            )
        schema = json.dumps(function, ensure_ascii=False, indent=4)
        text += f"\n## {function['name']}\n\n{schema}\n{TOOLS_FOOTER}"
    return text
