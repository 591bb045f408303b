"""Exercise checks tell right from wrong, and say "not attempted" until something was tried."""

import json

import pytest
import torch

from glm4_helpers.notebook import NOT_ATTEMPTED, RIGHT, WRONG, Outcome, check, judge, show_table, write_metrics


def do_nothing(text):
    """A docstring alone is no attempt."""
    ...


def pass_only(text, other=3):
    pass


def return_dots():
    return ...


def dots_then_pass(one, *others, key=2, **more):
    ...
    pass


def upper(text):
    return text.upper()


def zero():
    return 0


@pytest.mark.parametrize(
    "value",
    [
        ...,
        [1, ...],
        {"rank": ..., "alpha": 2},
        ((1, ...),),
        do_nothing,
        pass_only,
        return_dots,
        dots_then_pass,
        lambda x: ...,
    ],
)
def test_dots_are_not_attempted_and_the_test_is_not_run(value):
    def never(_):
        raise AssertionError("ran")

    assert judge(value, never) == Outcome(NOT_ATTEMPTED)


@pytest.mark.parametrize("value", [0, None, "", [], {}, False, zero, upper, lambda x: 1])
def test_anything_else_is_an_attempt(value):
    assert judge(value, lambda _: True) == Outcome(RIGHT)


@pytest.mark.parametrize(
    ("value", "test", "state"),
    [
        (3, lambda number: number == 3, RIGHT),
        (4, lambda number: number == 3, WRONG),
        (upper, lambda function: function("ab") == "AB", RIGHT),
        (upper, lambda function: function("ab") == "ab", WRONG),
        (torch.ones(2), lambda tensor: (tensor == 1).all(), RIGHT),
        (torch.zeros(2), lambda tensor: (tensor == 1).all(), WRONG),
    ],
)
def test_right_is_told_from_wrong(value, test, state):
    assert judge(value, test).state == state


def test_a_wrong_answer_comes_with_the_hint():
    assert judge(4, lambda number: number == 3, "Count again.") == Outcome(WRONG, "Count again.")


def test_a_right_answer_comes_without_the_hint():
    assert judge(3, lambda number: number == 3, "Count again.") == Outcome(RIGHT)


def test_an_assertion_of_the_test_says_more_than_the_hint():
    def test(number):
        assert number > 3, "Too small."
        return True

    assert judge(1, test, "Count again.") == Outcome(WRONG, "Too small.")


def test_an_error_in_the_answer_is_shown_and_not_raised():
    outcome = judge(upper, lambda function: function(1) == "A", "Give it text.")
    assert outcome.state == WRONG
    assert "AttributeError" in outcome.reason and "Give it text." in outcome.reason


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (3, "✅ Exercise 1: right.\n"),
        (4, "❌ Exercise 1: wrong. Count again.\n"),
        (..., "⬜ Exercise 1: not attempted.\n"),
    ],
)
def test_check_prints_one_line_and_returns_nothing(value, line, capsys):
    assert check("Exercise 1", value, lambda number: number == 3, "Count again.") is None
    assert capsys.readouterr().out == line


def test_figures_are_written_and_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("GLM4_HOME", str(tmp_path))
    write_metrics("02_model_inspection", {"parameters": 1})
    file = write_metrics("02_model_inspection", {"parameters": 2, "注": "二"})
    assert file == tmp_path / "outputs" / "metrics" / "02_model_inspection.json"
    assert json.loads(file.read_text(encoding="utf-8")) == {"parameters": 2, "注": "二"}


def test_a_table_keeps_bars_line_breaks_and_html_as_text():
    table = show_table(["asked", "answer"], [("a|b", "<|user|>\nsecond line "), (1, "  ")])
    assert table.data.splitlines() == [
        "| asked | answer |",
        "| --- | --- |",
        r"| a\|b | &lt;\|user\|&gt;<br>second line |",
        "| 1 | (nothing) |",
    ]


@pytest.mark.parametrize(("text", "cell"), [("四个汉字", "四个汉字"), ("五个字的话", "五个字…")])
def test_a_table_cuts_long_cells_and_shows_that_it_did(text, cell):
    assert show_table(["text"], [[text]], width=4).data.splitlines()[-1] == f"| {cell} |"
