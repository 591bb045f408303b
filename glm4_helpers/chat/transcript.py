"""A conversation as HTML for the chat box, and as Markdown for places without widgets.

Everything that a user or a model wrote is escaped. What was said is kept in conversation.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from .conversation import Reply, Turn

NOTES = {
    "writing": "…",
    "done": "",
    "stopped": "(stopped)",
    "limit": "(cut at the length limit)",
    "empty": "(an empty answer)",
    "failed": "",
}
"""What is shown for the ways in which a reply can end."""


# HTML

_BUBBLE = "padding:.4em .7em;border-radius:.5em;white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.5"
_QUIET = "color:var(--jp-ui-font-color2,inherit);font-size:.85em"
_USER = "background:var(--jp-layout-color2,rgba(128,128,128,.18))"
_REPLY = "border:1px solid var(--jp-border-color1,rgba(128,128,128,.5))"
_ERROR = "border:1px solid var(--jp-error-color1,#d32f2f)"


def to_html(turns: Sequence[Turn], system: str = "") -> str:
    """The transcript as one HTML element that screen readers announce as a log."""
    body = "".join(_turn_html(turn) for turn in turns)
    if not turns:
        body = f'<div style="{_QUIET}">Type a message below. Enter sends it, Shift+Enter breaks the line.</div>'
    elif system:
        body = f'<div style="{_QUIET}">system: {html.escape(system)}</div>{body}'
    return (
        '<div role="log" aria-label="conversation" '
        f'style="color:var(--jp-content-font-color1,inherit);padding:.5em">{body}</div>'
    )


def _turn_html(turn: Turn) -> str:
    question = f'<div style="{_QUIET}">you</div><div style="{_BUBBLE};{_USER}">{html.escape(turn.question)}</div>'
    replies = "".join(_reply_html(reply) for reply in turn.replies)
    return (
        f'<div style="margin:.3em 0 .8em">{question}'
        f'<div style="display:flex;flex-wrap:wrap;gap:.7em;margin-top:.4em">{replies}</div></div>'
    )


def _reply_html(reply: Reply) -> str:
    note = f' <span style="{_QUIET}">{html.escape(NOTES[reply.state])}</span>' if NOTES[reply.state] else ""
    error = f'<div role="alert">{html.escape(reply.error)}</div>' if reply.error else ""
    return (
        f'<div role="group" aria-label="{html.escape(reply.name)}" style="flex:1 1 16em;min-width:0">'
        f'<div style="{_QUIET}">{html.escape(reply.name)}</div>'
        f'<div style="{_BUBBLE};{_ERROR if error else _REPLY}">{html.escape(reply.text)}{note}{error}</div></div>'
    )


# Markdown


def to_markdown(turns: Sequence[Turn], system: str = "") -> str:
    """The transcript for places without widgets, such as GitHub: one paragraph a message, its text shown literally."""
    lines = [f"**system:** {markdown_text(system)}"] if system else []
    for turn in turns:
        lines.append(f"**you:** {markdown_text(turn.question)}")
        for reply in turn.replies:
            said = " ".join(part for part in (markdown_text(reply.text), markdown_text(reply.error)) if part)
            note = f" *{NOTES[reply.state]}*" if NOTES[reply.state] else ""
            lines.append(f"**{markdown_text(reply.name)}:** {said}{note}")
    return "\n\n".join(lines)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: HTML escaped, punctuation with a meaning in a line escaped, breaks kept."""
    escaped = re.sub(r"([\\`*_\[\]~|$#])", r"\\\1", html.escape(text, quote=False))
    return escaped.replace("\n", "<br>")
