"""The course's figures, drawn with matplotlib from plain results: scores, losses, counts, memory.

Nothing is computed or loaded here. Each figure brings its own light background, so it reads the same in dark themes.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from .support.fonts import CHINESE_FONTS, SHIPPED_FAMILY, SHIPPED_FONT

BEFORE, AFTER, ACCENT = "#8a94a6", "#1f6fb2", "#c2571a"
"""Grey before, blue after, orange for what is pointed at: told apart without colour vision, too."""

CYCLE = ("#1f6fb2", "#c2571a", "#3d8b5f", "#8659a8", "#b0902c", "#8a94a6", "#bd4a6e")
TEXT, FAINT, BACKGROUND = "#1f2430", "#d7dbe3", "#fcfcfd"

SET_LABELS = {
    "unseen_rows": "unseen rows",
    "unseen_entities": "unseen entities",
    "unseen_phrasings": "unseen phrasings",
    "second_turns": "second turns",
}

KINDS = {
    "word_to_english": ("译成英文", "word to English"),
    "english_to_word": ("译成中文", "English to word"),
    "category": ("类别", "category"),
    "property": ("性质", "property"),
    "opposite": ("反义词", "opposite"),
    "sum": ("加法", "sum"),
    "difference": ("减法", "difference"),
    "system": ("系统提示", "system prompt"),
    "follow_up": ("追问", "follow-up"),
    "capital": ("首都", "capital"),
    "capital_of": ("哪国首都", "capital of"),
    "list": ("列举", "list"),
    "quote": ("引用", "quote"),
    "sentence": ("造句", "sentence"),
    "count": ("数数", "count"),
    "plan": ("计划", "plan"),
    "new_topic": ("换话题", "new topic"),
    "descending": ("降序", "descending"),
    "ascending": ("升序", "ascending"),
    "larger": ("较大", "larger"),
    "smaller": ("较小", "smaller"),
    "remember": ("记住", "remember"),
    "introduce": ("介绍", "introduce"),
    "repeat": ("重复", "repeat"),
    "not_that_model": ("不是那个模型", "not that model"),
    "who": ("是谁", "who"),
    "hello": ("问候", "hello"),
    "thanks": ("感谢", "thanks"),
    "farewell": ("告别", "farewell"),
}
"""Kinds of the course's own rows, in Chinese and in English; other kinds are shown by their name."""

HALVES = {"dev": "dev set", "test": "test set"}
AS_TEXT_LABEL = "before, asked as plain text"

SMOOTHED_FROM = 500
"""Fewer losses are drawn as they are: a moving average would visibly lag behind them."""

MEMORY_PARTS = ("weights", "adapter", "gradients", "optimizer", "activations")


# Fonts and style


@functools.cache
def chinese_family() -> str:
    """The installed family that Chinese is drawn with; the shipped subset, registered here, where there is none."""
    installed = {font.name for font in fontManager.ttflist}
    found = next((family for family in CHINESE_FONTS if family in installed), None)
    if found is None:
        fontManager.addfont(SHIPPED_FONT)
    return found or SHIPPED_FAMILY


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings for the course's figures while the block runs; the reader's own come back afterwards."""
    settings = {
        # matplotlib falls back glyph by glyph along this list.
        "font.family": ["DejaVu Sans", chinese_family()],
        "font.size": 10,
        "figure.facecolor": BACKGROUND,
        "savefig.facecolor": BACKGROUND,
        "axes.facecolor": BACKGROUND,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": TEXT,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.unicode_minus": False,
        "axes.prop_cycle": matplotlib.cycler(color=CYCLE),
        "text.color": TEXT,
        "xtick.color": TEXT,
        "ytick.color": TEXT,
        "grid.color": FAINT,
        "legend.frameon": False,
        "figure.constrained_layout.w_pad": 0.1,
        "figure.constrained_layout.h_pad": 0.1,
    }
    with matplotlib.rc_context(settings):
        yield


def _figure(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the course's style, and finish within it: matplotlib makes tick labels at the first drawing only."""

    @functools.wraps(draw)
    def drawn(*arguments: Any, **options: Any) -> Figure:
        with style():
            figure = draw(*arguments, **options)
            figure.draw_without_rendering()
        return figure

    return drawn


def new_figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure with its axes, sizes in inches, that a notebook shows once: as the value of its cell."""
    import matplotlib.pyplot as pyplot  # registers how notebooks show figures

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", **options)
    pyplot.close(figure)
    return figure, axes


def kind_label(kind: str) -> str:
    """A kind of row in Chinese and English, as figures and tables show it."""
    return " ".join(KINDS.get(kind, (kind,)))


# Scores


@_figure
def before_after_figure(result: Mapping[str, Any], as_text: Mapping[str, Any] | None = None) -> Figure:
    """Accuracy of each held-out set with its 95 % interval, and the stop rate, before and after.

    `result` is what `before_after` returns, or its JSON. `as_text`, from `score_as_text`, adds the base model asked in
    plain text. Sets of free text, which have no accuracy, show their stop rate only.
    """
    names = list(result["before"]["sets"])
    scored = [name for name in names if result["before"]["sets"][name]["accuracy"]]
    bars = [("before", BEFORE, result["before"]["sets"])]
    if as_text:
        bars.append((AS_TEXT_LABEL, ACCENT, as_text["sets"]))
    bars.append(("after", AFTER, result["after"]["sets"]))
    height = 0.76 / len(bars)
    figure, (left, right) = new_figure(10, 1.6 + (0.34 * len(bars) - 0.06) * len(names), 2, width_ratios=(1.5, 1))
    for number, (label, colour, sets) in enumerate(bars):
        offset = (number - (len(bars) - 1) / 2) * height
        _interval_bars(left, [sets[name]["accuracy"] for name in scored], offset, height, colour, label)
    for offset, side, colour in ((-0.19, "before", BEFORE), (0.19, "after", AFTER)):
        _rate_bars(right, [result[side]["sets"][name]["stop_rate"] for name in names], offset, colour, side)
    rows = {name: len(result["before"]["sets"][name]["answers"]) for name in names}
    _name_rows(left, [f"{SET_LABELS.get(name, name)}\n{rows[name]} rows" for name in scored])
    _name_rows(right, [SET_LABELS.get(name, name) for name in names])
    left.set_title(f"right answers, {HALVES.get(result['half'], result['half'])}, 95 % intervals")
    right.set_title("answers that stopped by themselves")
    _legend_below(figure, left)
    return figure


@_figure
def kinds_figure(result: Mapping[str, Any]) -> Figure:
    """Accuracy of each kind of row in each held-out set after fine-tuning, with 95 % intervals.

    The kind with most right answers, over all sets, is on top. `result` is what `before_after` returns, or its JSON.
    """
    sets = {name: scored for name, scored in result["after"]["sets"].items() if scored["kinds"]}
    kinds = sorted(_right_by_kind(sets).items(), key=lambda item: (-item[1], kind_label(item[0])))
    width, height = 3.2 + 2.2 * len(sets), 0.8 + 0.25 * len(kinds)
    figure, axes = new_figure(width, height, max(1, len(sets)), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], sets):
        for row, (kind, _) in enumerate(kinds):
            if score := sets[name]["kinds"].get(kind):
                axis.plot([100 * score["low"], 100 * score["high"]], [row, row], color=AFTER, linewidth=1.2)
                axis.plot(100 * score["accuracy"], row, "o", color=AFTER, markersize=5)
        axis.set_title(SET_LABELS.get(name, name))
        axis.tick_params(axis="y", length=0)
        _percent_axis(axis)
        axis.set_xlim(left=-4)  # dots at nought are drawn whole
    _name_rows(axes[0][0], [kind_label(kind) for kind, _ in kinds])
    return figure


@_figure
def surprise_figure(tokens: Sequence[str], before: Sequence[float], after: Sequence[float]) -> Figure:
    """How unexpected each token of one answer is to both models: -ln of its probability, in nats."""
    figure, axis = new_figure(max(5.0, 1.5 + 0.45 * len(tokens)), 3.2)
    for offset, values, colour, label in ((-0.2, before, BEFORE, "before"), (0.2, after, AFTER, "after")):
        axis.bar([place + offset for place in range(len(tokens))], values, 0.4, color=colour, label=label)
    axis.set_xticks(range(len(tokens)), tokens)
    axis.set_ylabel("surprise (nats)")
    axis.grid(axis="y")
    axis.legend(loc="upper right")
    return figure


def _right_by_kind(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The fraction of right answers of each kind, over all sets."""
    right, total = Counter(), Counter()
    for scored in sets.values():
        for kind, score in scored["kinds"].items():
            right[kind] += score["right"]
            total[kind] += score["total"]
    return {kind: right[kind] / total[kind] for kind in total}


def _interval_bars(
    axis: Axes, scores: Sequence[Mapping[str, float]], offset: float, height: float, colour: str, label: str
) -> None:
    places = [row + offset for row in range(len(scores))]
    values = [100 * score["accuracy"] for score in scores]
    below = [100 * (score["accuracy"] - score["low"]) for score in scores]
    above = [100 * (score["high"] - score["accuracy"]) for score in scores]
    # Rounding may leave -1e-15, which matplotlib refuses.
    spread = [[max(0.0, value) for value in side] for side in (below, above)]
    error = {"ecolor": TEXT, "capsize": 3, "elinewidth": 1}
    axis.barh(places, values, 0.95 * height, color=colour, label=label, xerr=spread, error_kw=error)
    for place, value, width in zip(places, values, spread[1]):
        axis.annotate(f"{value:.0f} %", (value + width, place), (5, 0), textcoords="offset points", va="center", size=9)
    _percent_axis(axis)


def _rate_bars(axis: Axes, rates: Sequence[float], offset: float, colour: str, label: str) -> None:
    places = [row + offset for row in range(len(rates))]
    axis.barh(places, [100 * rate for rate in rates], 0.36, color=colour, label=label)
    for place, rate in zip(places, rates):
        text = f"{100 * rate:.0f} %"
        axis.annotate(text, (100 * rate, place), (5, 0), textcoords="offset points", va="center", size=9)
    _percent_axis(axis)


def _percent_axis(axis: Axes) -> None:
    axis.set_xlim(0, 112)
    axis.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    axis.grid(axis="x")


def _name_rows(axis: Axes, names: Sequence[str]) -> None:
    """Row names on the vertical axis, the first on top."""
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)


def _legend_below(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels) if len(labels) < 7 else 4)


# Training


@_figure
def loss_figure(
    log_history: Sequence[Mapping[str, Any]],
    dev: Sequence[Mapping[str, float]] | None = None,
) -> Figure:
    """Training loss by step on a log axis, with the dev loss where it was measured.

    `log_history` is the trainer's. `dev` are mappings of step and loss; None takes the history's own eval_loss. From
    SMOOTHED_FROM logged losses on, a moving average shows their trend.
    """
    train = [(row["step"], row["loss"]) for row in log_history if "loss" in row]
    points = _dev_points(log_history) if dev is None else [(row["step"], row["loss"]) for row in dev]
    figure, axis = new_figure(7.5, 3.4)
    if train:
        steps, losses = zip(*train)
        many = len(train) >= SMOOTHED_FROM
        axis.plot(steps, losses, color=AFTER, alpha=0.4 if many else 1, linewidth=1.2, label="training loss")
        if many:
            axis.plot(steps, smoothed(losses), color=AFTER, linewidth=2, label="training loss, smoothed")
    if points:
        axis.plot(*zip(*points), "o-", color=ACCENT, linewidth=1.5, label="dev loss")
    axis.set_xlabel("step")
    axis.set_ylabel("loss (nats per answer token)")
    axis.set_xlim(0, 1.02 * max((step for step, _ in [*train, *points]), default=1))
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(axis="y")
    if train or points:
        axis.legend(loc="upper right")
    return figure


@_figure
def sweep_figure(runs: Sequence[Mapping[str, Any]], setting: str) -> Figure:
    """Right answers with 95 % intervals, and facts still known, over one setting on a log axis.

    Each of the runs has the setting, and `right` and `knows`, two `evaluation.Rate`. Shown in 05, 5.4.
    """
    figure, axis = new_figure(7.5, 3.4)
    places = [run[setting] for run in runs]
    for name, colour, label in (("right", AFTER, "right answers, dev rows"), ("knows", BEFORE, "facts still known")):
        axis.plot(places, [100 * run[name].value for run in runs], "o-", color=colour, label=label)
        axis.vlines(places, *([100 * run[name].interval[end] for run in runs] for end in (0, 1)), color=colour)
    axis.set_xscale("log")
    axis.set_xticks(places, [f"{place:g}" for place in places])
    axis.minorticks_off()
    axis.set_xlabel(setting)
    axis.set_ylabel("%")
    axis.set_ylim(0, 105)
    axis.grid(axis="y")
    axis.legend(loc="lower right")
    return figure


@_figure
def grid_figure(runs: Mapping[tuple[Any, Any], Mapping[str, Any]], rows: str, columns: str) -> Figure:
    """Right answers, and facts still known, over two settings: two maps with a number in each field.

    `runs` holds each run under its values of both settings, with `right` and `knows`, two `evaluation.Rate`. Shown in
    05, 5.3.
    """
    down, across = (sorted({key[place] for key in runs}) for place in (0, 1))
    figure, axes = new_figure(7.5, 2.9, columns=2)
    titles = {"right": "right answers, dev rows (%)", "knows": "facts still known (%)"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        values = [[100 * runs[row, column][name].value for column in across] for row in down]
        axis.imshow(values, cmap="Blues", vmin=0, vmax=130, aspect="auto")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                axis.text(x, y, f"{value:.0f}", ha="center", va="center")
        axis.set_xticks(range(len(across)), [f"{value:g}" for value in across])
        axis.set_yticks(range(len(down)), [f"{value:g}" for value in down])
        axis.set(title=title, xlabel=columns, ylabel=rows)
    return figure


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without its pull towards zero at the start (Adam's bias correction)."""
    average, out = 0.0, []
    for count, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**count))
    return out


def _dev_points(log_history: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    return [(row["step"], row["eval_loss"]) for row in log_history if "eval_loss" in row]


@_figure
def checkpoints_figure(checkpoints: Sequence[Mapping[str, Any]]) -> Figure:
    """Dev loss, dev accuracy and stop rate of each checkpoint, the best one marked.

    `checkpoints` are those of a TrainingResult: mappings of step, dev_loss, dev_token_accuracy, stop_rate (fractions;
    None where it was not measured) and best. Where all have a dev_accuracy (of whole answers, a fraction or a mapping
    of accuracy, low and high), that is drawn instead of the tokens'. Without a `best`, the lowest dev loss is.
    """
    whole = all(row.get("dev_accuracy") is not None for row in checkpoints)
    accuracy = ("dev_accuracy", "right dev answers (%)") if whole else ("dev_token_accuracy", "right dev tokens (%)")
    figure, axes = new_figure(10, 3.2, 3)
    for axis, (key, title) in zip(axes, (("dev_loss", "dev loss"), accuracy, ("stop_rate", "stop rate (%)"))):
        _draw_checkpoints(axis, checkpoints, key, title)
    _legend_below(figure, axes[0])
    return figure


def best_checkpoint(checkpoints: Sequence[Mapping[str, Any]]) -> int:
    """Index of the checkpoint marked as best, else of the one with the lowest dev loss."""
    marked = [index for index, row in enumerate(checkpoints) if row.get("best")]
    return marked[0] if marked else min(range(len(checkpoints)), key=lambda index: checkpoints[index]["dev_loss"])


def _draw_checkpoints(axis: Axes, checkpoints: Sequence[Mapping[str, Any]], key: str, title: str) -> None:
    steps = [row["step"] for row in checkpoints]
    scale = 1 if key == "dev_loss" else 100
    values = [scale * _fraction(row[key]) for row in checkpoints]
    best = best_checkpoint(checkpoints)
    axis.plot(steps, values, "o-", color=AFTER)
    for row in checkpoints:
        if isinstance(row[key], Mapping):
            axis.plot([row["step"]] * 2, [100 * row[key]["low"], 100 * row[key]["high"]], color=AFTER, linewidth=1)
    ring = {"color": ACCENT, "markersize": 11, "fillstyle": "none", "markeredgewidth": 2}
    axis.plot(steps[best], values[best], "o", label="best", **ring)
    axis.set(title=title, xlabel="step", xticks=steps)
    axis.tick_params(axis="x", rotation=45 if len(steps) > 5 else 0)
    axis.grid(axis="y")
    axis.margins(x=0.12)
    lows = [100 * row[key]["low"] for row in checkpoints if isinstance(row[key], Mapping)]
    # Intervals of a few points would vanish on an axis from 0.
    axis.set_ylim(10 * (min(lows) // 10) if lows else 0, 1.1 * max(values) if scale == 1 else 101 if lows else 105)


def _fraction(value: float | Mapping[str, float] | None) -> float:
    """The number to draw; what was not measured is a gap."""
    if value is None:
        return float("nan")
    return value["accuracy"] if isinstance(value, Mapping) else value


# Model, rows, memory


@_figure
def parameter_figure(table: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Parameters by part of the model, with their share; `table` is what `models.parameter_table` returns."""
    parts = {row["part"]: row["parameters"] for row in table if row["part"] != "total"}
    return _shares_figure(
        parts, short_count, f"{title + ': ' if title else ''}{sum(parts.values()):,} parameters", accent="adapter"
    )


@_figure
def seconds_figure(parts: Mapping[str, float], title: str) -> Figure:
    """Seconds by part, with their share.

    Shown in 05, 5.7.
    """
    return _shares_figure(parts, _milliseconds, f"{title}: {_milliseconds(sum(parts.values()))}")


def _shares_figure(parts: Mapping[str, float], short: Callable[[float], str], title: str, accent: str = "") -> Figure:
    figure, axis = new_figure(7.5, 1.0 + 0.42 * len(parts))
    axis.barh(range(len(parts)), [*parts.values()], 0.62, color=[ACCENT if part == accent else AFTER for part in parts])
    for place, value in enumerate(parts.values()):
        text = f"{short(value)}   {_share(value / sum(parts.values()))}"
        axis.annotate(text, (value, place), (5, 0), textcoords="offset points", va="center", size=9)
    _name_rows(axis, [*parts])
    axis.set_xlim(0, 1.28 * max(parts.values()))
    axis.xaxis.set_major_formatter(lambda value, _: short(value))
    axis.grid(axis="x")
    axis.set_title(title)
    return figure


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def short_count(count: float) -> str:
    """1,234,567 as 1.23 M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.3g} {letter}"
    return f"{count:.3g}"


def _share(fraction: float) -> str:
    return f"{100 * fraction:.1f} %" if fraction >= 0.001 else f"{100 * fraction:.3f} %"


@_figure
def lengths_figure(lengths: Sequence[int], max_length: int | None = None) -> Figure:
    """How many rows have how many tokens; `max_length` draws the limit that longer rows fall over."""
    figure, axis = new_figure(7.5, 3.2)
    axis.hist(lengths, bins=min(60, max(10, len(set(lengths)))), color=AFTER, edgecolor=BACKGROUND, linewidth=0.4)
    if max_length is not None:
        over = sum(length > max_length for length in lengths)
        axis.axvline(
            max_length, color=ACCENT, linestyle="--", label=f"上限 limit {max_length}: {over:,} 行更长 rows longer"
        )
        axis.legend(loc="upper center")
    axis.set_xlabel("每行词元数 tokens per row")
    axis.set_ylabel("行数 rows")
    longest = f", 最长 longest {max(lengths)}" if len(lengths) else ""
    axis.set_title(f"{len(lengths):,} 行 rows{longest}")
    axis.grid(axis="y")
    return figure


@_figure
def kinds_of_rows_figure(rows: Sequence[Mapping[str, Any]] | Mapping[str, int]) -> Figure:
    """How many rows there are of each kind, the most frequent on top. `rows` have a `kind`, or are counts by kind."""
    counts = Counter(rows) if isinstance(rows, Mapping) else Counter(row["kind"] for row in rows)
    ordered = counts.most_common()
    figure, axis = new_figure(7.5, 1.0 + 0.25 * len(ordered))
    axis.barh(range(len(ordered)), [count for _, count in ordered], 0.7, color=AFTER)
    for place, (_, count) in enumerate(ordered):
        axis.annotate(f"{count:,}", (count, place), (4, 0), textcoords="offset points", va="center", size=9)
    _name_rows(axis, [kind_label(kind) for kind, _ in ordered])
    axis.set_xlim(0, 1.12 * max(counts.values(), default=1))
    axis.set_xlabel("行数 rows")
    axis.grid(axis="x")
    return figure


@_figure
def memory_figure(parts: Mapping[str, Mapping[str, float]], limit: float | None = None) -> Figure:
    """Stacked bars of memory: `parts` maps a bar's name to bytes by part (MEMORY_PARTS, in this order, then others).

    `limit`, in bytes, draws the memory at hand.
    """
    unit, name = _unit(max([sum(bar.values()) for bar in parts.values()] + [limit or 0]))
    seen = {part for bar in parts.values() for part in bar}
    order = [part for part in MEMORY_PARTS if part in seen] + sorted(seen - set(MEMORY_PARTS))
    figure, axis = new_figure(8.5, 1.5 + 0.55 * len(parts))
    left = [0.0] * len(parts)
    for number, part in enumerate(order):
        widths = [bar.get(part, 0) / unit for bar in parts.values()]
        look = {"color": CYCLE[number % len(CYCLE)], "hatch": "///" * (number // len(CYCLE)), "edgecolor": BACKGROUND}
        axis.barh(range(len(parts)), widths, 0.6, left=left, label=part, **look)
        left = [start + width for start, width in zip(left, widths)]
    for place, total in enumerate(left):
        box = {"facecolor": BACKGROUND, "edgecolor": "none", "pad": 1.5}
        text = f"{total:.3g} {name}"
        axis.annotate(text, (total, place), (5, 0), textcoords="offset points", va="center", size=9, bbox=box)
    if limit is not None:
        axis.axvline(limit / unit, color=TEXT, linestyle="--", label=f"at hand: {limit / unit:.3g} {name}")
    _name_rows(axis, list(parts))
    axis.set_xlim(0, 1.15 * max([*left, (limit or 0) / unit]))
    axis.set_xlabel(name)
    axis.grid(axis="x")
    _legend_below(figure, axis)
    return figure


def _unit(largest: float) -> tuple[float, str]:
    return (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")
