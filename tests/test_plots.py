"""The figures: what they show, and that Chinese has glyphs with and without an installed Chinese font."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import ROOT
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font

from glm4_helpers import plots
from glm4_helpers.evaluation import Rate
from glm4_helpers.machine import memory
from glm4_helpers.profiles import get_profile


def score(right, total=20):
    return Rate(right, total).as_dict()


def side(right, stop_rate):
    scored = {
        "accuracy": score(2 * right, 40),
        "kinds": {"capital": score(right), "我的类别": score(right)},
        "stop_rate": stop_rate,
        "loss": 1.0,
        "answers": [{}] * 40,
    }
    free_text = {**scored, "accuracy": None, "kinds": {}}
    return {"sets": {"unseen_rows": scored, "second_turns": scored, "alpaca": free_text}}


RESULT = {"half": "test", "before": side(1, 0.5), "after": side(19, 1.0)}
AS_TEXT = {"sets": {name: {"accuracy": score(30, 40)} for name in ("unseen_rows", "second_turns")}}
HISTORY = [{"step": step, "loss": 4 / step} for step in range(1, 40)] + [{"step": 20, "eval_loss": 0.4}]
CHECKPOINTS = [
    {"step": 10, "dev_loss": 0.5, "dev_token_accuracy": 0.8, "stop_rate": 0.9, "best": False},
    {"step": 20, "dev_loss": 0.3, "dev_token_accuracy": 0.9, "stop_rate": None, "best": True},
]
GRID = {(rate, rank): {"right": Rate(rank, 40), "knows": Rate(40, 40)} for rate in (2e-3, 5e-4) for rank in (8, 2)}
TABLE = [
    {"part": "mlp", "parameters": 3_000_000, "trainable": 0, "share": 0.999},
    {"part": "adapter", "parameters": 3_000, "trainable": 3_000, "share": 0.001},
    {"part": "total", "parameters": 3_003_000, "trainable": 3_000, "share": 1.0},
]
FIGURES = {
    "before_after": lambda: plots.before_after_figure(RESULT),
    "before_after_prompted": lambda: plots.before_after_figure(RESULT, AS_TEXT),
    "kinds": lambda: plots.kinds_figure(RESULT),
    "loss": lambda: plots.loss_figure(HISTORY),
    "checkpoints": lambda: plots.checkpoints_figure(CHECKPOINTS),
    "parameters": lambda: plots.parameter_figure(TABLE),
    "seconds": lambda: plots.seconds_figure({"forward": 0.03, "backward": 0.06}, "a step"),
    "lengths": lambda: plots.lengths_figure([5, 9, 30], max_length=20),
    "kinds_of_rows": lambda: plots.kinds_of_rows_figure([{"kind": kind} for kind in plots.KINDS]),
    "grid": lambda: plots.grid_figure(GRID, "learning rate", "rank"),
    "sweep": lambda: plots.sweep_figure([{"rows": 200 * run["right"].right, **run} for run in GRID.values()], "rows"),
    "surprise": lambda: plots.surprise_figure(["newline", "斯", "end"], [9.0, 1.0, 0.5], [0.1, 0.0, 0.2]),
    "memory": lambda: plots.memory_figure({"LoRA": {"weights": 2**34, "我的": 2**30}}, limit=24 * 2**30),
}


def texts(figure: Figure) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_with_all_its_glyphs_and_shown_once(name, tmp_path):
    import matplotlib.pyplot as pyplot

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a missing glyph
        figure = FIGURES[name]()
        figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000
    assert pyplot.get_fignums() == [], "a notebook would show an open figure a second time"


def test_the_readers_own_settings_come_back():
    import matplotlib

    before = matplotlib.rcParams.copy()
    plots.lengths_figure([1, 2, 3])
    assert matplotlib.rcParams == before


def test_text_stands_out_from_a_background_of_its_own():
    """So a dark theme behind the picture changes nothing."""
    figure = plots.loss_figure(HISTORY)
    assert figure.get_facecolor()[3] == 1
    lightness = [sum(figure.get_facecolor()[:3]), *(sum(bytes.fromhex(plots.TEXT[1:])) / 255,)]
    assert lightness[0] > 2.9 and lightness[1] < 0.6


def test_before_after_shows_accuracy_interval_and_stop_rate():
    figure = plots.before_after_figure(json.loads(json.dumps(RESULT)))
    left, right = figure.axes
    shown = [text.get_text() for text in left.texts]
    assert shown == ["5 %", "5 %", "95 %", "95 %"]
    assert [text.get_text() for text in right.texts] == ["50 %"] * 3 + ["100 %"] * 3
    low, high = left.collections[0].get_segments()[0][:, 0]
    assert low == pytest.approx(100 * RESULT["before"]["sets"]["unseen_rows"]["accuracy"]["low"])
    assert high == pytest.approx(100 * RESULT["before"]["sets"]["unseen_rows"]["accuracy"]["high"])


def test_a_prompted_base_model_stands_between_before_and_after():
    left, right = plots.before_after_figure(RESULT, AS_TEXT).axes
    assert [text.get_text() for text in left.texts] == ["5 %", "5 %", "75 %", "75 %", "95 %", "95 %"]
    assert len({bar.get_facecolor() for bar in left.patches}) == 3
    places = sorted(bar.get_y() + bar.get_height() / 2 for bar in left.patches)
    assert places == pytest.approx([row + offset for row in (0, 1) for offset in (-0.2533, 0, 0.2533)], abs=1e-3)
    assert len(right.texts) == 6, "a line that ends is no stop token: text has no stop rate"


@pytest.mark.parametrize(("half", "title"), [("test", "test set"), ("dev", "dev set"), ("held-out", "held-out")])
def test_sets_are_called_dev_and_test_set(half, title):
    figure = plots.before_after_figure({**RESULT, "half": half})
    assert figure.axes[0].get_title(loc="left") == f"right answers, {title}, 95 % intervals"


def test_kinds_are_named_in_both_languages_and_your_own_as_they_are():
    assert plots.kind_label("capital_of") == "哪国首都 capital of"
    assert plots.kind_label("我的类别") == "我的类别"


def test_kinds_are_those_of_the_fine_tuned_model():
    figure = plots.kinds_figure(RESULT)
    dots = {float(line.get_xdata()[0]) for axis in figure.axes for line in axis.lines if line.get_marker() == "o"}
    assert dots == {95.0}


def test_kinds_has_a_column_for_each_set_that_can_be_right():
    figure = plots.kinds_figure(RESULT)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["unseen rows", "second turns"]
    assert {"首都 capital", "我的类别"} <= set(texts(figure))


def test_loss_takes_dev_from_the_history_or_from_the_caller():
    def dev_points(figure):
        line = next(line for line in figure.axes[0].lines if line.get_label() == "dev loss")
        return list(zip(*line.get_data()))

    assert dev_points(plots.loss_figure(HISTORY)) == [(20, 0.4)]
    assert dev_points(plots.loss_figure(HISTORY, dev=[{"step": 5, "loss": 1.5}])) == [(5, 1.5)]


@pytest.mark.parametrize(("logged", "lines"), [(222, 1), (plots.SMOOTHED_FROM, 2)])
def test_losses_are_on_a_log_axis_and_only_many_are_smoothed(logged, lines):
    axis = plots.loss_figure([{"step": step, "loss": 4 / step} for step in range(1, logged + 1)]).axes[0]
    assert axis.get_yscale() == "log"
    assert len(axis.lines) == lines
    assert list(axis.lines[0].get_ydata()[:2]) == [4, 2]


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant():
    assert plots.smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert plots.smoothed([10.0, 0.0])[0] == pytest.approx(10.0)


def test_the_best_checkpoint_is_the_marked_one_else_that_of_the_lowest_dev_loss():
    assert plots.best_checkpoint(CHECKPOINTS) == 1
    assert plots.best_checkpoint([{"dev_loss": 0.2, "best": True}, {"dev_loss": 0.1}]) == 0
    assert plots.best_checkpoint([{"dev_loss": 0.2}, {"dev_loss": 0.1}, {"dev_loss": 0.3}]) == 1


def test_checkpoints_prefer_the_accuracy_of_whole_answers():
    rows = [{**row, "dev_accuracy": score(15)} for row in CHECKPOINTS]
    assert "right dev answers (%)" in texts(plots.checkpoints_figure(rows))
    assert "right dev tokens (%)" in texts(plots.checkpoints_figure(CHECKPOINTS))


def test_seconds_are_drawn_as_milliseconds_with_their_shares():
    shown = texts(plots.seconds_figure({"forward": 0.03, "backward": 0.06}, "a step"))
    assert "a step: 90 ms" in shown and "30 ms   33.3 %" in shown and "60 ms   66.7 %" in shown


def test_parameters_leave_the_total_to_the_title():
    shown = texts(plots.parameter_figure(TABLE, "nano"))
    assert "nano: 3,003,000 parameters" in shown and "total" not in shown and "3 M   99.9 %" in shown


@pytest.mark.parametrize(
    ("count", "text"), [(9_399_951_360, "9.4 B"), (5_406_720, "5.41 M"), (1_234, "1.23 k"), (7, "7")]
)
def test_short_counts(count, text):
    assert plots.short_count(count) == text


def test_lengths_count_the_rows_over_the_limit():
    assert any("20: 1 " in text for text in texts(plots.lengths_figure([5, 9, 30], max_length=20)))


def test_kinds_of_rows_are_counted_from_rows_or_taken_as_counts():
    from_rows = plots.kinds_of_rows_figure([{"kind": "sum"}, {"kind": "sum"}, {"kind": "list"}])
    from_counts = plots.kinds_of_rows_figure({"list": 1, "sum": 2})
    assert texts(from_rows) == texts(from_counts)
    assert [text.get_text() for text in from_rows.axes[0].texts] == ["2", "1"]


def test_a_grid_has_rows_and_columns_in_order_and_a_number_in_each_field():
    right, knows = plots.grid_figure(GRID, "learning rate", "rank").axes
    assert [label.get_text() for label in right.get_yticklabels()] == ["0.0005", "0.002"]
    assert [label.get_text() for label in right.get_xticklabels()] == ["2", "8"]
    assert [text.get_text() for text in right.texts] == ["5", "20"] * 2
    assert [text.get_text() for text in knows.texts] == ["100"] * 4


def test_memory_in_gibibytes_or_mebibytes():
    assert "1 GiB" in texts(plots.memory_figure({"bar": {"weights": 2**29, "activations": 2**29}}))
    assert "12 MiB" in texts(plots.memory_figure({"bar": {"weights": 12 * 2**20}}))


def test_memory_shows_every_part_of_an_estimate_and_their_sum():
    estimate = memory.estimate_memory(get_profile("glm-4-9b-qlora"))
    axis = plots.memory_figure({"QLoRA": estimate.by_part()}).axes[0]
    assert sum(bar.get_width() for bar in axis.patches) == pytest.approx(estimate.total_gib)
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in axis.patches}) == len(estimate.parts) > 7


# Fonts


def test_the_shipped_font_has_every_character_of_the_labels_and_the_rows():
    glyphs = get_font(plots.SHIPPED_FONT).get_charmap()
    written = "".join(map(plots.kind_label, plots.KINDS)) + (ROOT / "glm4_helpers" / "plots.py").read_text(
        encoding="utf-8"
    )
    for file in sorted((ROOT / "data").rglob("*.json")):
        written += file.read_text(encoding="utf-8")
    assert {character for character in written if character.isprintable() and ord(character) not in glyphs} <= set("±")


def test_the_shipped_font_comes_with_its_licence():
    licence = (plots.SHIPPED_FONT.parent / "OFL.txt").read_text(encoding="utf-8")
    assert "SIL OPEN FONT LICENSE Version 1.1" in licence and "Adobe" in licence
    assert plots.SHIPPED_FONT.stat().st_size < 1_500_000


WITHOUT_CHINESE_FONT = """
import io, sys, warnings
from matplotlib import font_manager
manager = font_manager.fontManager
manager.ttflist = [font for font in manager.ttflist if "/mpl-data/" in font.fname.replace("\\\\", "/")]
from conftest import NANO
from glm4_helpers import plots, read_rows
from glm4_helpers.widgets import token_view_figure
from test_plots import FIGURES
from transformers import AutoTokenizer
tokenizer, rows = AutoTokenizer.from_pretrained(NANO), {row["kind"]: row for row in read_rows("data/train.json")}
warnings.simplefilter("error")
for figure in [draw() for draw in FIGURES.values()] + [token_view_figure(tokenizer, row) for row in rows.values()]:
    figure.savefig(io.BytesIO())
FIGURES["kinds_of_rows"]().savefig(sys.argv[1])
print(plots.chinese_family())
"""


def test_without_any_chinese_font_the_shipped_one_is_used(tmp_path):
    """All figures, and a token view of each kind of row, in a process whose matplotlib knows its own fonts only.

    matplotlib warns of a missing glyph, which is an error there.
    """
    picture = Path(os.environ.get("GLM4_SCREENSHOTS") or tmp_path) / "plot_without_chinese_font.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", WITHOUT_CHINESE_FONT, str(picture)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "MPLCONFIGDIR": str(tmp_path), "PYTHONPATH": path, "MPLBACKEND": "agg"}
    finished = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == plots.SHIPPED_FAMILY
    assert picture.stat().st_size > 20_000


def test_an_installed_chinese_font_is_preferred(monkeypatch):
    class Font:
        name = "WenQuanYi Micro Hei"

    plots.chinese_family.cache_clear()
    monkeypatch.setattr(plots.fontManager, "ttflist", [Font()])
    try:
        assert plots.chinese_family() == "WenQuanYi Micro Hei"
    finally:
        plots.chinese_family.cache_clear()


# The drawn figures


def test_the_drawn_figures_are_there_with_all_their_glyphs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "images"))
    import draw

    monkeypatch.setattr(draw, "FOLDER", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw.main()
    for name in draw.FIGURES:
        committed = (ROOT / "images" / f"{name}.svg").read_text(encoding="utf-8")
        assert draw.BACKGROUND in committed, "it needs a background of its own in dark themes"
        assert "<text" not in committed, "text as shapes needs no font on the reader's machine"
        assert len((tmp_path / f"{name}.svg").read_text(encoding="utf-8")) == pytest.approx(len(committed), rel=0.1)
