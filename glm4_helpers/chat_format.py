"""The GLM-4 chat format: messages to text, to token ids and to labels. Shown step by step in notebook 03.

Which control tokens a model uses, and what stands in front, is read from its tokenizer: GLM-Edge differs from GLM-4.
Nothing here reads files or knows about profiles, models or training; rows become messages in ``row_shapes``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
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

_TOOLS_FIX = 'Write tools as [{"type": "function", "function": {"name": "...", ...}}].'

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
        {{- '<|' + item['role'] + '|>' }}
        {%- if item['role'] == 'assistant' %}
            {%- generation %}
                {{- (item['metadata'] or '') + '\\n' + item['content'] }}
                {%- if loop.last and not add_generation_prompt %}
                    {{- '<|endoftext|>' }}
                {%- endif %}
            {%- endgeneration %}
        {%- else %}
            {{- (item['metadata'] or '') + '\\n' + item['content'] }}
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
    """One rendered turn: ``<|role|>metadata``, a newline, the content (never empty).

    ``train`` False masks the turn; ``ended`` False is an answer that was cut: what it says is trained, its end is not.
    """

    role: str
    metadata: str
    content: str
    train: bool = True
    ended: bool = True


def render(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
    """The text that the official GLM-4 template gives for ``messages``. To look at; never tokenize it again.

    Raises DataError for messages that are not usable.
    """
    text = "".join(PREFIX)
    for turn in _turns(messages, _official_tools):
        text += f"<|{turn.role}|>{turn.metadata}\n{turn.content}"
    return text + ("<|assistant|>" if add_generation_prompt else "")


def encode(tokenizer, messages: Sequence[Mapping[str, Any]], terminator: str = TERMINATOR) -> dict[str, list[int]]:
    """Token ids and labels of a whole conversation, as two lists of the same length.

    The ids are those of ``render``, plus one terminator after a last assistant turn; tools are worded as the
    tokenizer's own template has them. Labels cover what the model writes in every assistant turn, which is a call's
    function name (``metadata``), the newline, the content and the end; all else is IGNORE. The format closes no turn,
    so after an answer in the middle the input keeps the next role token while the label there is the terminator: every
    answer learns the same ending. A call that follows its own text or another call is part of one answer, so its
    ``<|assistant|>`` is learned in place of an ending. A message with ``"train": False`` is read and not learned; one
    with ``"ended": False`` learns no ending. Control tokens are placed by id, so no text in a message can forge a turn.

    Raises DataError for unusable messages, SettingError for a terminator that ends nothing, and ModelError for a
    tokenizer whose chat format is another.
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
    """Token ids that ask for the next answer: the conversation, then ``<|assistant|>`` (in GLM-4 the model itself emits
    the newline that follows).

    Raises DataError for unusable messages and where the last turn with content is the assistant's own.
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


def tools_text(tokenizer, tools: Sequence[Mapping[str, Any]]) -> str:
    """The system text that lists ``tools``, worded as the tokenizer's own chat template words it.

    Templates of GLM-4-9B take tools from the system message, those of GLM-4-9B-0414 as a variable; both are tried.
    A tokenizer without a template gets the official wording of GLM-4-9B. Raises ModelError where the template writes
    no tools.
    """
    if tokenizer.chat_template is None:
        return _official_tools(tools)
    return _template_tools(tokenizer.chat_template, _special(tokenizer), json.dumps(tools, ensure_ascii=False))


def function_tools(tools: Any) -> list[dict[str, Any]]:
    """Tools as ``[{"type": "function", "function": {"name": ...}}]``, from that, from bare functions or JSON text.

    Raises DataError for anything else; the text of its problem begins in lower case, to follow a place.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except json.JSONDecodeError as error:
            raise DataError(f"the value of 'tools' is not JSON: {error.msg}.", _TOOLS_FIX) from error
    if not isinstance(tools, (list, tuple)):
        raise DataError(f"the value of 'tools' is {kind(tools)}, not a list.", _TOOLS_FIX)
    functions = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError("it has a tool that is not a named function.", _TOOLS_FIX)
        functions.append({"type": "function", "function": dict(function)})
    return functions


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
    prefix, prompt_end = _template_ends(tokenizer.chat_template, _special(tokenizer))
    return ChatFormat(_prefix_ids(tokenizer, prefix, control), roles, stops, prompt_end)


def _special(tokenizer) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(token)) for name, token in tokenizer.special_tokens_map.items())


def _written(template: str, special: tuple[tuple[str, str], ...], messages: list[dict], tools: Any = None) -> str:
    """What a chat template makes of a conversation that asks for an answer."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(
            [messages], tools=tools, chat_template=template, add_generation_prompt=True, **dict(special)
        )
    except Exception as error:  # templates raise errors of their own, of many kinds
        raise ModelError(f"This tokenizer's chat template fails: {error}.", _TEMPLATE_FIX) from error
    return rendered[0]


@lru_cache(maxsize=16)
def _template_ends(template: str, special: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    """What a chat template writes in front of the first turn, and after the last ``<|assistant|>``."""
    turns = (("user", "A"), ("assistant", "B"), ("user", "C"))
    wanted = "".join(f"<|{role}|>\n{content}" for role, content in turns) + "<|assistant|>"
    written = _written(template, special, [{"role": role, "content": content} for role, content in turns])
    prefix, found, end = written.partition(wanted)
    if not found or end not in ("", "\n"):
        raise ModelError(f"This tokenizer's chat template writes {written!r}, not {wanted!r}.", _TEMPLATE_FIX)
    return prefix, end


@lru_cache(maxsize=1024)  # most rows of a data set share their tools
def _template_tools(template: str, special: tuple[tuple[str, str], ...], tools_json: str) -> str:
    prefix, prompt_end = _template_ends(template, special)
    tools, user = json.loads(tools_json), {"role": "user", "content": "A"}
    for messages, given in (([{"role": "system", "content": "", "tools": tools}, user], None), ([user], tools)):
        written = _written(template, special, messages, given)
        text = written.removeprefix(f"{prefix}<|system|>\n").removesuffix(f"<|user|>\nA<|assistant|>{prompt_end}")
        if all(tool["function"]["name"] in text for tool in tools) and "<|user|>\nA" not in text:
            return text
    raise ModelError(
        "This tokenizer's chat template writes no tools.",
        "Train a model whose template does, such as GLM-4-9B, or tell of the tools in the rows' system prompt.",
    )


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


def _turns(messages: Sequence[Mapping[str, Any]], write_tools: Callable[[list[dict]], str]) -> list[Turn]:
    """Checked turns as they are rendered: tools become a system turn, turns with empty content are gone."""
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


def checked_text(value: Any, what: str) -> str:
    """``value``, if it is text that can be tokenized. Raises DataError, which calls it ``what``."""
    fix = "Give it as a string."
    if value is None:
        raise DataError(f"{what[0].upper()}{what[1:]} is missing.", fix)
    if not isinstance(value, str):
        raise DataError(f"{what[0].upper()}{what[1:]} is {kind(value)}, not text.", fix)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"half a character ({value[error.start]!r}, number {error.start + 1})"
        fix = "Remove it; mostly it is an emoji that was cut in two."
        raise DataError(f"{what[0].upper()}{what[1:]} holds {half}.", fix) from error
    return value


def kind(value: Any) -> str:
    """What a JSON value is, in plain words."""
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), f"of type {type(value).__name__}")


def _placed_tools(tools: Any, where: str) -> list[dict[str, Any]]:
    try:
        return function_tools(tools)
    except DataError as error:
        raise DataError(f"{where.capitalize()}: {error.problem}", error.fix) from None


def _official_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """The system text that lists function tools, as the official template of GLM-4-9B words it."""
    text = TOOLS_HEADER
    for tool in tools:
        schema = json.dumps(tool["function"], ensure_ascii=False, indent=4)
        text += f"\n## {tool['function']['name']}\n\n{schema}\n{TOOLS_FOOTER}"
    return text
