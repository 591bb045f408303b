"""Scoring: what counts as right, intervals, loss, and scores that do not depend on the batch size."""

import json
from dataclasses import asdict

import pytest
import torch

from glm4_helpers import chat_format
from glm4_helpers.datasets import to_messages
from glm4_helpers.errors import DataError, ModelError
from glm4_helpers.evaluation import (
    assistant_token_loss,
    before_after,
    check_answer,
    cloze_accuracy,
    evaluate_rows,
    format_table,
    is_right,
    read_held_out,
    read_plain,
    wilson_interval,
)
from glm4_helpers.generation import Answer
from glm4_helpers.profiles import get_profile

FRUIT = {
    "type": "distinct_of", "count": 2, "members": ["苹果", "香蕉", "桃子"], "prefix": "", "suffix": "。", "separator": "、",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "right"),
    [("苹果、桃子。", True), ("苹果、苹果。", False), ("苹果。", False), ("苹果、汽车。", False), ("苹果、桃子", False), ("", False)],
)
def test_a_list_needs_so_many_different_members(text, right):
    assert check_answer(FRUIT, text) is right


def test_the_whole_answer_has_to_match_after_normalisation():
    check = {"type": "exact", "answers": ["1+2=3。"]}
    assert check_answer(check, " １＋２＝３。\n")
    assert not check_answer(check, "1+2=3。对吗？")
    assert not check_answer(check, "3")
    assert check_answer({"type": "one_of", "answers": ["3", "三"]}, "三")


def test_an_unknown_check_is_named():
    with pytest.raises(DataError, match="fuzzy"):
        check_answer({"type": "fuzzy"}, "x")


def test_an_answer_that_never_stops_is_not_right():
    row = {"check": {"type": "exact", "answers": ["好"]}}
    assert is_right(row, Answer("好", True, 2))
    assert not is_right(row, Answer("好", False, 200))


def test_wilson_interval_against_published_values():
    # Newcombe 1998 (Stat. Med. 17:857), table I: 81 of 263 and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_loss_is_the_models_own_on_assistant_tokens(nano_model, nano_tokenizer):
    messages = [{"role": "user", "content": "你好。"}, {"role": "assistant", "content": "你好！有什么可以帮你？"}]
    encoded = {key: torch.tensor([ids]) for key, ids in chat_format.encode(nano_tokenizer, messages).items()}
    with torch.no_grad():
        expected = nano_model(**encoded).loss.item()
    padded = [messages, [*messages, *messages]]
    assert assistant_token_loss(nano_model, nano_tokenizer, [messages]) == pytest.approx(expected, rel=1e-5)
    together = assistant_token_loss(nano_model, nano_tokenizer, padded, batch_size=2)
    assert together == pytest.approx(assistant_token_loss(nano_model, nano_tokenizer, padded, batch_size=1), rel=1e-5)


@pytest.mark.slow
def test_scores_do_not_depend_on_the_batch_size(nano_model, nano_tokenizer):
    rows = read_held_out(get_profile("glm4-nano"), "dev")["unseen_rows"][::4]
    one, seven, many = (evaluate_rows(nano_model, nano_tokenizer, rows, size) for size in (1, 7, 64))
    assert one.answers == seven.answers == many.answers
    assert asdict(one.accuracy) == asdict(many.accuracy)
    assert one.loss == pytest.approx(many.loss, rel=1e-5)


def test_cloze_takes_the_answer_only_where_the_sentence_ends(nano_model, nano_tokenizer):
    facts = read_plain("cloze")[:40]
    figures = cloze_accuracy(nano_model, nano_tokenizer, facts)
    nonsense = cloze_accuracy(nano_model, nano_tokenizer, [{**fact, "answers": ["不"]} for fact in facts])
    assert figures["all"]["right"] > 30
    assert nonsense["all"]["right"] == 0


def test_rows_without_a_check_are_judged_by_loss_and_stop_rate(nano_model, nano_tokenizer):
    rows = [{"instruction": "写一首诗。", "input": "", "output": "好。"}]
    scored = evaluate_rows(nano_model, nano_tokenizer, rows, max_new_tokens=8)
    assert scored.accuracy is None and scored.loss > 0 and 0 <= scored.stop_rate <= 1
    assert to_messages(rows[0])[0]["role"] == "user"


def test_absent_held_out_rows_and_adapters_are_named(tmp_path, monkeypatch):
    profile = get_profile("glm4-nano", test_data="data/nowhere")
    with pytest.raises(DataError, match="unseen_rows.json.*not there"):
        read_held_out(profile, "test")
    with pytest.raises(ModelError, match="adapter"):
        before_after(get_profile("glm4-nano"), tmp_path / "none")


def test_the_table_shows_before_and_after_with_intervals():
    side = {
        "sets": {
            "unseen_rows": {
                "accuracy": {"right": 1, "total": 2, "accuracy": 0.5, "low": 0.09, "high": 0.91},
                "stop_rate": 0.75,
                "loss": 1.25,
                "answers": [{}, {}],
            }
        },
        "cloze": {"all": {"accuracy": 1.0, "low": 0.5, "high": 1.0}},
        "plain_questions": {"all": {"accuracy": 0.25, "low": 0.1, "high": 0.4}},
    }
    table = format_table({"half": "test", "before": side, "after": json.loads(json.dumps(side))})
    assert "before" in table and "after" in table
    assert "50.0% [9.0%, 91.0%]" in table and "75.0%" in table and "1.250" in table
    assert table.splitlines()[-1].startswith("2 held-out rows of the test half")
