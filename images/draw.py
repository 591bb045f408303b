"""Draws the figures of the course that are not measured: data flow, chat format, LoRA and a layer.

    python images/draw.py

Writes images/*.svg with text as shapes, so that they look the same everywhere, Chinese included. Each has a light
background of its own and so reads the same in dark themes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from glm4_helpers.plots import ACCENT, AFTER, BACKGROUND, BEFORE, TEXT, style
from glm4_helpers.support.fonts import SHIPPED_FAMILY, SHIPPED_FONT

FOLDER = Path(__file__).resolve().parent
GREEN, PURPLE, FAINT_LINE = "#3d8b5f", "#8659a8", "#9aa1b0"


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Axes in inches, without ticks."""
    figure = Figure(figsize=(width, height), facecolor=BACKGROUND)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return figure, axes


def _box(axes: Axes, left: float, bottom: float, width: float, height: float, text: str, colour: str, **font) -> None:
    """A rounded box with text in its middle; the fill is a pale form of the edge's colour."""
    shape = "round,pad=0,rounding_size=0.07"
    axes.add_patch(FancyBboxPatch((left, bottom), width, height, shape, facecolor=colour + "26", edgecolor=colour))
    axes.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", **{"size": 9.5} | font)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = TEXT) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, shrinkA=2, shrinkB=2))


ROOMS = {"rows": (6.4, GREEN), "checks": (4.85, PURPLE), "machine": (3.3, ACCENT), "runs": (1.75, AFTER)}
"""Middle and colour of the rooms that the core uses; support, which every module uses, is a bar below them all."""
GUESTS = {"widgets": 5.5, "chat": 3.6}
"""Middle of the rooms that use a part of the core; cli, which uses nearly all, is a bar above."""
TOP, STEP = 7.2, 0.66
"""Middle of the core's first box, and from one to the next, in inches."""


def data_flow() -> Figure:
    """The core in reading order with what flows, the rooms around it, and who opens which room: images/house.json."""
    house = json.loads(Path(__file__).with_name("house.json").read_text(encoding="utf-8"))
    arrows, rooms = house["arrows"], house["rooms"]
    figure, axes = _canvas(10.6, 8.3)
    heights = {module: TOP - STEP * place for place, (module, _) in enumerate(house["core"])}
    for module, what in house["core"]:
        _unit(axes, 4.1, heights[module], 2.2, module, what, BEFORE)
    for above, below in zip(heights.values(), [*heights.values()][1:]):
        _arrow(axes, (5.2, above - 0.24), (5.2, below + 0.24))
    for room, (middle, colour) in ROOMS.items():
        _unit(axes, 7.9, middle, 2.5, room, rooms[room], colour)
        doors = [module for module in heights if room in arrows[module]]
        for place, module in enumerate(doors):
            end = middle + 0.06 * ((len(doors) - 1) / 2 - place)
            _arrow(axes, (6.3, heights[module]), (7.9, end), colour)
    for room, middle in GUESTS.items():
        _unit(axes, 0.2, middle, 2.35, room, rooms[room], TEXT)
        doors = [module for module in heights if module in arrows[room]]
        for place, module in enumerate(doors):
            start = middle + 0.06 * ((len(doors) - 1) / 2 - place)
            _arrow(axes, (2.55, start), (4.1, heights[module]), FAINT_LINE)
    for bar, middle, arrow in (
        ("cli", 7.95, (7.71, TOP + 0.24)),
        ("support", 0.35, (heights["notebook"] - 0.24, 0.59)),
    ):
        _unit(axes, 0.2, middle, 10.2, bar, rooms[bar], TEXT)
        _arrow(axes, (5.2, arrow[0]), (5.2, arrow[1]))
    return figure


def _unit(axes: Axes, left: float, middle: float, width: float, name: str, what: str, colour: str) -> None:
    """A box with a module's or room's name and what flows through it or is in it."""
    _box(axes, left, middle - 0.24, width, 0.48, "", colour)
    axes.text(left + width / 2, middle + 0.09, name, ha="center", va="center", size=10)
    axes.text(left + width / 2, middle - 0.11, what, ha="center", va="center", size=8)


PIECES = (
    (2.45, (("[gMASK]", 1.35, BEFORE), ("<sop>", 1.35, BEFORE))),
    (
        1.75,
        (
            ("<|user|>", 1.35, GREEN),
            ("↵ 大象的英文是什么？", 2.5, GREEN),
            ("<|assistant|>", 1.35, AFTER),
            ("↵ elephant。", 1.5, AFTER),
        ),
    ),
    (
        1.05,
        (
            ("<|user|>", 1.35, GREEN),
            ("↵ 老虎呢？", 1.6, GREEN),
            ("<|assistant|>", 1.35, AFTER),
            ("↵ tiger。", 1.2, AFTER),
            ("<|endoftext|>", 1.35, ACCENT),
        ),
    ),
)
"""Bottom of each line, then its pieces: text, width and colour."""

TRAINED = {(1.75, 3), (1.05, 0), (1.05, 3), (1.05, 4)}
"""Pieces that the loss looks at, by bottom and place: answers, and what stands where they end."""


def chat_format() -> Figure:
    """A conversation of two turns as GLM-4 reads it, and which of its tokens are trained."""
    figure, axes = _canvas(10.4, 3.3)
    for bottom, pieces in PIECES:
        left = 0.3
        for place, (text, width, colour) in enumerate(pieces):
            _box(axes, left, bottom, width, 0.42, text, colour)
            if (bottom, place) in TRAINED:
                _underline(axes, left + 0.05, left + width - 0.05, bottom - 0.07)
            left += width + 0.12
    _note(axes, 3.35, 2.66, "prefix, once; the tokenizer's own way of beginning")
    _note(axes, 0.47, 0.85, "label: <|endoftext|>", 7)
    _underline(axes, 0.3, 0.75, 0.42)
    _note(axes, 0.9, 0.42, "trained: the answers with their newline and their end. All else is context (label -100).")
    _note(axes, 0.3, 3.08, "大象的英文是什么？ What is ‘elephant’ in English?    老虎呢？ And tiger?    ↵ newline")
    return figure


def _underline(axes: Axes, left: float, right: float, height: float) -> None:
    axes.plot([left, right], [height] * 2, color=ACCENT, linewidth=4, solid_capstyle="butt")


def _note(axes: Axes, left: float, middle: float, text: str, size: float = 8.5) -> None:
    axes.text(left, middle, text, va="center", size=size)


def lora() -> Figure:
    """One linear layer with LoRA: a frozen matrix beside two thin ones that are trained."""
    figure, axes = _canvas(10.4, 3.9)
    _box(axes, 0.4, 1.55, 0.9, 0.8, "x\n4096", BEFORE)
    _box(axes, 2.6, 2.1, 2.6, 1.5, "W, frozen\n4096 × 4096\n16,777,216 parameters", BEFORE)
    _box(axes, 2.6, 0.45, 1.3, 0.8, "A, trained\n8 × 4096", ACCENT)
    _box(axes, 5.0, 0.45, 1.3, 0.8, "B, trained\n4096 × 8", ACCENT)
    _box(axes, 7.1, 1.75, 0.5, 0.5, "+", AFTER, size=14)
    _box(axes, 8.5, 1.55, 1.4, 0.8, "Wx + (α/r)·BAx", AFTER)
    for start, end in (
        ((1.3, 2.05), (2.6, 2.85)),
        ((1.3, 1.85), (2.6, 0.85)),
        ((3.9, 0.85), (5.0, 0.85)),
        ((5.2, 2.85), (7.1, 2.1)),
        ((6.3, 0.85), (7.1, 1.9)),
        ((7.6, 2.0), (8.5, 2.0)),
    ):
        _arrow(axes, start, end)
    _note(axes, 4.13, 1.05, "8 numbers", 8)
    _note(axes, 6.75, 1.05, "× α/r")
    _note(axes, 2.6, 0.15, "r = 8: 65,536 parameters, 0.4 % of W. B starts at zero: training begins at the base model.")
    return figure


BRANCHES = (
    (
        0.75,
        (
            ("RMSNorm", "scaled to\none size", BEFORE),
            ("q, k, v_proj", "4096 → 4096\n+ 2 × 256", ACCENT),
            ("attention", "rotary, 32 heads,\nsees earlier tokens", AFTER),
            ("o_proj", "4096 → 4096", BEFORE),
        ),
    ),
    (
        5.85,
        (
            ("RMSNorm", "scaled to\none size", BEFORE),
            ("gate_up_proj", "4096 → 2 × 13696", BEFORE),
            ("SiLU(gate) × up", "13696 numbers", AFTER),
            ("down_proj", "13696 → 4096", BEFORE),
        ),
    ),
)
"""Left edge of each branch off the residual stream, then its steps: name, sizes in GLM-4-9B and colour."""


def layer() -> Figure:
    """One layer of GLM-4-9B: two branches read the residual stream, and what they compute is added to it."""
    figure, axes = _canvas(10.6, 4.3)
    axes.plot([0.2, 10.2], [0.75] * 2, color=GREEN, linewidth=5, solid_capstyle="butt")
    _arrow(axes, (10.1, 0.75), (10.5, 0.75), GREEN)
    _note(axes, 0.2, 0.42, "residual stream: 4096 numbers a token, from the embedding through all 40 layers to lm_head")
    _note(
        axes, 0.2, 0.15, "orange: where the SwanLab tutorial puts LoRA; gate_up_proj is gate_proj and up_proj in one", 8
    )
    for left, steps in BRANCHES:
        for place, (name, size, colour) in enumerate(steps):
            bottom = (1.35, 2.75)[place in (1, 2)]
            column = left + (0.0, 0.0, 2.3, 2.3)[place]
            _box(axes, column, bottom, 1.75, 0.95, f"{name}\n{size}", colour, size=8.5)
        middle, end = left + 0.875, left + 3.175
        _arrow(axes, (middle, 0.78), (middle, 1.35))
        _arrow(axes, (middle, 2.3), (middle, 2.75))
        _arrow(axes, (left + 1.75, 3.22), (left + 2.3, 3.22))
        _arrow(axes, (end, 2.75), (end, 2.3))
        _arrow(axes, (end, 1.35), (end, 0.95))
        _box(axes, end - 0.18, 0.57, 0.36, 0.36, "+", GREEN, size=13)
        _note(axes, left, 4.0, ("self_attn: tokens exchange" if left < 3 else "mlp: each token for itself"), 9)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "data_flow": data_flow,
    "chat_format": chat_format,
    "lora": lora,
    "layer": layer,
}


def main() -> None:
    """Draw all figures, always with the shipped font and fixed ids: the same code gives the same files."""
    matplotlib.font_manager.fontManager.addfont(SHIPPED_FONT)
    settings = {"font.family": ["DejaVu Sans", SHIPPED_FAMILY], "svg.fonttype": "path", "svg.hashsalt": "course"}
    for name, draw in FIGURES.items():
        with style(), matplotlib.rc_context(settings):
            draw().savefig(FOLDER / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
