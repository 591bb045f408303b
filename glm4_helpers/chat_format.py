"""The GLM-4 chat format: messages to text, to token ids and to labels. Shown step by step in notebook 03.

Which control tokens a model uses, and what stands in front, is read from its tokenizer: GLM-Edge differs from GLM-4.
Nothing here reads files or knows about profiles, models or training; rows become messages in ``datasets``.
"""

from __future__ import annotations

import json
from functools import lru_cache
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
"""Any of these ends an answer, where the tokenizer has it: GlmConfig's default eos list."""

_TEMPLATE_FIX = "Load the tokenizer of a GLM-4 or GLM-Edge model: its turns are <|role|>, a newline and the content."

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


class ChatFormat(NamedTuple):
    """A tokenizer's chat format as token ids: what opens a conversation, the roles, and the tokens that end an answer.

    ``stops`` are by token, the usual terminator first. ``prompt_end`` is text that the tokenizer's own template puts
    after the last ``<|assistant|>``: nothing, or a newline.
    """

    prefix: tuple[int, ...]
    roles: dict[str, int]
    stops: dict[str, int]
    prompt_end: str


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

    Raises DataError for unusable messages, SettingError for a terminator that ends nothing, and ModelError for a
    tokenizer whose chat format is another.
    """
    turns = _turns(messages)
    chat = read_format(tokenizer)
    end = _terminator_id(chat, terminator)
    ids = list(chat.prefix)
    labels = [IGNORE] * len(ids)
    after_answer = False
    for turn, metadata, body in zip(turns, *_turn_ids(tokenizer, turns)):
        ids += [_role_id(chat, turn.role), *metadata, *body]
        labels += [end if after_answer else IGNORE] + [IGNORE] * len(metadata)
        after_answer = turn.role == "assistant"
        labels += body if after_answer else [IGNORE] * len(body)
    if after_answer:
        ids.append(end)
        labels.append(end)
    return {"input_ids": ids, "labels": labels}


def prompt_ids(tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids that ask for the next answer: the conversation, then ``<|assistant|>`` (in GLM-4 the model itself emits
    the newline that follows).

    Raises DataError for unusable messages and where the last turn with content is the assistant's own.
    """
    turns = _turns(messages)
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


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The same conversation with role, content and metadata only; tools become the system text they are rendered as.

    So it fits a table column, where tools of different shapes would not. Empty messages stay. Raises DataError.
    """
    plain: list[dict[str, str]] = []
    for number, message in enumerate(_checked_list(messages), 1):
        plain += [_as_message(turn) for turn in _message_turns(message, f"message {number}", keep_empty=True)]
    return plain


def stop_ids(tokenizer) -> list[int]:
    """The ids that end an answer, the usual terminator first. Raises ModelError as ``read_format`` does."""
    return list(read_format(tokenizer).stops.values())


def read_format(tokenizer) -> ChatFormat:
    """The chat format of a tokenizer, from its special tokens and its chat template.

    A template has to write every turn as ``<|role|>``, newline, content, and to end a prompt with ``<|assistant|>``;
    what it puts in front of the first turn is the prefix. Without a template the prefix is what the tokenizer itself
    puts in front of text. Raises ModelError where tokens are absent or the template writes something else.
    """
    control = tokenizer.get_added_vocab()
    roles = {role: control[f"<|{role}|>"] for role in ROLES if f"<|{role}|>" in control}
    known = dict.fromkeys((TERMINATOR, tokenizer.eos_token, *STOP_TOKENS))
    stops = {token: control[token] for token in known if token in control}
    missing = [f"<|{role}|>" for role in ("user", "assistant") if role not in roles]
    if missing or set(stops) <= {f"<|{role}|>" for role in ROLES}:
        raise ModelError(
            f"This tokenizer lacks the special tokens {', '.join(missing) or TERMINATOR}.",
            "Load the tokenizer of a GLM-4 or GLM-Edge model, such as the shipped weights/glm4-nano.",
        )
    if tokenizer.chat_template is None:
        return ChatFormat(tuple(tokenizer("")["input_ids"]), roles, stops, "")
    special = tuple((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    prefix, prompt_end = _template_ends(tokenizer.chat_template, special)
    return ChatFormat(_prefix_ids(tokenizer, prefix, control), roles, stops, prompt_end)


@lru_cache(maxsize=16)
def _template_ends(template: str, special_tokens: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    """What a chat template writes in front of the first turn, and after the last ``<|assistant|>``."""
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = (("user", "A"), ("assistant", "B"), ("user", "C"))
    messages = [{"role": role, "content": content} for role, content in turns]
    wanted = "".join(f"<|{role}|>\n{content}" for role, content in turns) + "<|assistant|>"
    try:
        rendered, _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=True, **dict(special_tokens)
        )
    except Exception as error:  # templates raise errors of their own, of many kinds
        raise ModelError(f"This tokenizer's chat template fails: {error}.", _TEMPLATE_FIX) from error
    prefix, found, end = rendered[0].partition(wanted)
    if not found or end not in ("", "\n"):
        raise ModelError(f"This tokenizer's chat template writes {rendered[0]!r}, not {wanted!r}.", _TEMPLATE_FIX)
    return prefix, end


def _prefix_ids(tokenizer, prefix: str, control: Mapping[str, int]) -> tuple[int, ...]:
    ids = tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []
    if not set(ids) <= set(control.values()):
        raise ModelError(
            f"This tokenizer's chat template opens with the text {prefix!r}, not with special tokens only.", _TEMPLATE_FIX
        )
    return tuple(ids)


def _turn_ids(tokenizer, turns: Sequence[Turn]) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of every turn's metadata and of its newline with content, all tokenized as plain text."""
    # The newline goes with the content: a tokenizer may merge it with what follows, as the official rendering does.
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
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"half a character ({value[error.start]!r}, number {error.start + 1})"
        raise DataError(
            f"The {key} of {where} ({message['role']}) holds {half}.", "Remove it; mostly it is an emoji that was cut in two."
        ) from error
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
