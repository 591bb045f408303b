"""Whether a value of a message is what it has to be: text that can be tokenized, tools that are functions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..support.errors import DataError

_TOOLS_FIX = 'Write tools as [{"type": "function", "function": {"name": "...", ...}}].'


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
