"""What a tokenizer's own chat template writes: its prefix, its roles, its end, its wording of tools.

GLM-Edge differs from GLM-4, so nothing is taken for granted. Messages become ids in chat_format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from ..support.errors import ModelError

ROLES = ("system", "user", "assistant", "observation")
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)
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
CHAT_TEMPLATE = """\
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
""".replace("HEADER", json.dumps(TOOLS_HEADER, ensure_ascii=False)).replace(
    "FOOTER", json.dumps(TOOLS_FOOTER, ensure_ascii=False)
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


def tools_text(tokenizer, tools: Sequence[Mapping[str, Any]]) -> str:
    """The system text that lists ``tools``, worded as the tokenizer's own chat template words it.

    Templates of GLM-4-9B take tools from the system message, those of GLM-4-9B-0414 as a variable; both are tried.
    A tokenizer without a template gets the official wording of GLM-4-9B. Raises ModelError where the template writes
    no tools.
    """
    if tokenizer.chat_template is None:
        return official_tools(tools)
    return _template_tools(tokenizer.chat_template, _special(tokenizer), json.dumps(tools, ensure_ascii=False))


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
            f"This tokenizer's chat template opens with the text {prefix!r}, not with special tokens only.",
            _TEMPLATE_FIX,
        )
    return tuple(ids)


def official_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """The system text that lists function tools, as the official template of GLM-4-9B words it."""
    text = TOOLS_HEADER
    for tool in tools:
        schema = json.dumps(tool["function"], ensure_ascii=False, indent=4)
        text += f"\n## {tool['function']['name']}\n\n{schema}\n{TOOLS_FOOTER}"
    return text
