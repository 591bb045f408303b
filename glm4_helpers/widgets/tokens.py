"""The token view: every token of a row as a coloured box with its id, its role and whether it is trained.

Ids and labels come from chat_format.encode; nothing is tokenized in another way here.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from transformers import PreTrainedTokenizerBase

from ..chat_format import IGNORE, encode
from ..checks.chat_template import ROLES, TERMINATOR, read_format
from ..data import to_messages
from ..plots import BACKGROUND, new_figure, style

ROLE_COLOURS = {
    "prefix": "#8a94a6",
    "system": "#8659a8",
    "user": "#3d8b5f",
    "assistant": "#1f6fb2",
    "observation": "#b0902c",
}
TRAINED = "#c2571a"
_VISIBLE = {"\n": "↵", " ": "␣", "\t": "⇥", "": "∅"}


@dataclass(frozen=True)
class TokenBox:
    """One token: its text made visible, its id, whose turn it is in, and its label (IGNORE where it is not trained).

    `target` is the text of the label where that differs from the token itself, else empty.
    """

    text: str
    token_id: int
    role: str
    label: int
    target: str = ""

    @property
    def trained(self) -> bool:
        """Whether the loss looks at this token."""
        return self.label != IGNORE


def token_boxes(tokenizer: PreTrainedTokenizerBase, row: Any, terminator: str = TERMINATOR) -> list[TokenBox]:
    """The tokens of one row or list of messages, in order. Raises DataError for a row that is not usable."""
    encoded = encode(tokenizer, _messages(row), terminator)
    chat = read_format(tokenizer)
    roles = {token: role for role, token in chat.roles.items()} | dict.fromkeys(chat.prefix, "prefix")
    role, boxes = "prefix", []
    for token_id, label in zip(encoded["input_ids"], encoded["labels"], strict=True):
        role = roles.get(token_id, role)
        target = _visible(tokenizer, label) if label not in (IGNORE, token_id) else ""
        boxes.append(TokenBox(_visible(tokenizer, token_id), token_id, role, label, target))
    return boxes


def _messages(row: Any) -> list[Mapping[str, Any]]:
    """Messages of a row in any format of `datasets`, or the messages themselves."""
    return to_messages(row) if isinstance(row, Mapping) else list(row)


def _visible(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """A token's text with white space shown; the token's own name for a byte of a character."""
    text = tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if "\ufffd" in text:
        text = tokenizer.convert_ids_to_tokens(token_id)
    return "".join(_VISIBLE.get(character, character) for character in text) or _VISIBLE[""]


# HTML


def token_view_html(tokenizer: PreTrainedTokenizerBase, row: Any, terminator: str = TERMINATOR) -> str:
    """Static HTML of one row's tokens, readable in light and dark themes. Raises DataError as `token_boxes` does."""
    boxes = token_boxes(tokenizer, row, terminator)
    lines = "".join(
        f'<div style="display:flex;flex-wrap:wrap;gap:3px;margin:0 0 6px">{"".join(map(_box_html, line))}</div>'
        for line in _turn_lines(boxes)
    )
    trained = sum(box.trained for box in boxes)
    summary = f"{len(boxes)} tokens, {trained} of them trained"
    return (
        f'<div style="color:var(--jp-content-font-color1,inherit);line-height:1.25">{_legend_html()}'
        f'<div role="list" aria-label="{summary}">{lines}</div><div>{summary}</div></div>'
    )


def _box_html(box: TokenBox) -> str:
    title = f"{box.text}, id {box.token_id}, {box.role}, {'trained' if box.trained else 'not trained'}"
    title += f", label {box.target}" if box.target else ""
    return (
        f'<span role="listitem" title="{html.escape(title)}" style="{_box_style(box.role, box.trained)}">'
        f"{html.escape(box.text)}<br>"
        f'<span style="font-size:.7em;opacity:.85">{html.escape(_below(box))}</span></span>'
    )


def _box_style(role: str, trained: bool) -> str:
    colour = ROLE_COLOURS[role]
    bottom = f"4px solid {TRAINED}" if trained else f"4px solid {colour}40"
    return (
        f"display:inline-block;text-align:center;padding:2px 5px;border-radius:4px;background:{colour}38;"
        f"border:1px solid {colour};border-bottom:{bottom};white-space:pre"
    )


def _legend_html() -> str:
    parts = [f'<span style="{_box_style(role, False)}">{role}</span>' for role in ROLE_COLOURS]
    parts.append(f'<span style="{_box_style("assistant", True)}">trained</span>')
    note = '<span style="font-size:.85em">below: the id, or → the label where it is another token</span>'
    row = "display:flex;flex-wrap:wrap;gap:5px;align-items:center;margin:0 0 8px"
    return f'<div style="{row}">{"".join(parts)}{note}</div>'


def _turn_lines(boxes: Sequence[TokenBox]) -> list[list[TokenBox]]:
    """The boxes with a new line for each turn."""
    lines: list[list[TokenBox]] = []
    for before, box in zip([None, *boxes], boxes):
        if before is None or box.text in {f"<|{role}|>" for role in ROLES} and box.role != before.role:
            lines.append([])
        lines[-1].append(box)
    return lines


# Widget


def token_view(
    tokenizer: PreTrainedTokenizerBase, rows: Any, terminator: str = TERMINATOR, chosen: int = 0
) -> ipywidgets.Widget:
    """The token view with a Dropdown for the row. `rows` is a list of rows, a Dataset, or the messages of one row."""
    rows = _rows(rows)
    labels = [(f"{number}: {_title(row)}", number - 1) for number, row in enumerate(rows, 1)]
    row_chooser = ipywidgets.Dropdown(
        options=labels,
        value=chosen,
        description="Row",
        layout=ipywidgets.Layout(width="min(100%, 36em)"),
        style={"description_width": "initial"},
    )
    shown = ipywidgets.HTML()

    def show(_: Any = None) -> None:
        try:
            shown.value = token_view_html(tokenizer, rows[row_chooser.value], terminator)
        except Exception as error:  # a callback's traceback would be lost: the row's fault is shown in its place
            shown.value = f'<div role="alert" style="white-space:pre-wrap">error: {html.escape(str(error))}</div>'

    row_chooser.observe(show, "value")
    show()
    return _TokenPanel([row_chooser, shown])


class _TokenPanel(ipywidgets.VBox):
    """The widgets of the view; as text, which is what GitHub shows, one line."""

    def __repr__(self) -> str:
        return "token view: run the notebook to choose rows"


def _rows(rows: Any) -> list[Any]:
    """A list of rows, also from one row or the messages of one."""
    if isinstance(rows, Mapping):
        return [rows]
    rows = list(rows)
    return [rows] if rows and isinstance(rows[0], Mapping) and "role" in rows[0] else rows


def _title(row: Any, longest: int = 28) -> str:
    """The kind of a row, if it has one, and the start of its last question."""
    kind = row.get("kind") if isinstance(row, Mapping) else None
    try:
        question = next(message["content"] for message in reversed(_messages(row)) if message["role"] == "user")
    except Exception:  # an unusable row can still be chosen: the view then says what is wrong with it
        question = "(not usable)"
    question = " ".join(question.split())
    question = question if len(question) <= longest else question[: longest - 1] + "…"
    return f"{kind}: {question}" if kind else question


# Figure

_LINE_HEIGHT, _WIDTH, _GAP = 3.4, 96.0, 0.5
"""In units of half a character's width."""


def token_view_figure(tokenizer: PreTrainedTokenizerBase, row: Any, terminator: str = TERMINATOR) -> Figure:
    """The token view as a picture, for places without widgets. Raises DataError as `token_boxes` does."""
    placed = _placed(token_boxes(tokenizer, row, terminator))
    lines = 1 + max(line for *_, line in placed)
    with style():
        figure, axis = new_figure(9.6, 0.36 * (lines + 0.8))
        for box, left, width, line in placed:
            _draw_box(axis, box, left, width, (lines - 1 - line) * _LINE_HEIGHT)
        _draw_legend(axis)
        axis.set(xlim=(-0.3, _WIDTH + 0.3), ylim=(-0.4, (lines + 0.7) * _LINE_HEIGHT))
        axis.set_axis_off()
        figure.draw_without_rendering()
    return figure


def _placed(boxes: Sequence[TokenBox]) -> list[tuple[TokenBox, float, float, int]]:
    """Each box with its left edge, width and line; turns begin new lines, and long ones are wrapped."""
    placed, line = [], -1
    for turn in _turn_lines(boxes):
        left, line = 0.0, line + 1
        for box in turn:
            width = max(_columns(box.text) * 1.02, 0.75 * _columns(_below(box))) + 1.1
            if left + width > _WIDTH:
                left, line = 0.0, line + 1
            placed.append((box, left, width, line))
            left += width + _GAP
    return placed


def _below(box: TokenBox) -> str:
    return f"→ {box.target}" if box.target else str(box.token_id)


def _columns(text: str) -> int:
    """Width in half characters: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _draw_box(axis: Axes, box: TokenBox, left: float, width: float, bottom: float) -> None:
    colour, height = ROLE_COLOURS[box.role], 0.82 * _LINE_HEIGHT
    shape = FancyBboxPatch(
        (left, bottom),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.3",
        facecolor=colour + "30",
        edgecolor=colour,
        linewidth=0.8,
    )
    axis.add_patch(shape)
    if box.trained:
        line = {"color": TRAINED, "linewidth": 3, "solid_capstyle": "butt"}
        axis.plot([left + 0.2, left + width - 0.2], [bottom - 0.05] * 2, **line)
    middle = {"ha": "center", "va": "center"}
    axis.text(left + width / 2, bottom + 0.62 * height, _plain(box.text), size=8.5, **middle)
    axis.text(left + width / 2, bottom + 0.22 * height, _plain(_below(box)), size=5.5, **middle)


def _draw_legend(axis: Axes) -> None:
    for role, colour in ROLE_COLOURS.items():
        axis.plot([], [], "s", color=colour, markersize=8, alpha=0.6, label=role)
    axis.plot([], [], color=TRAINED, linewidth=3, label="trained")
    axis.legend(
        loc="upper left",
        ncols=len(ROLE_COLOURS) + 1,
        fontsize=8,
        borderaxespad=0,
        handlelength=1.2,
        columnspacing=1.4,
        facecolor=BACKGROUND,
    )


def _plain(text: str) -> str:
    """Text without matplotlib's own markup, which a dollar sign would begin."""
    return text.replace("$", r"\$")
