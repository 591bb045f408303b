"""Scoring: what counts as right, intervals, loss, and scores that do not depend on the batch size."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tiny_models import save_live_adapter, save_model, tiny_glm, tiny_tokenizer

from glm4_helpers import chat_format, evaluation, models, training
from glm4_helpers.__main__ import main
from glm4_helpers.datasets import to_messages
from glm4_helpers.errors import DataError, ModelError
from glm4_helpers.evaluation import (
    assistant_token_loss,
    before_after,
    check_answer,
    cloze_accuracy,
    evaluate_rows,
    find_baseline,
    format_table,
    is_right,
    read_free_text,
    read_held_out,
    read_plain,
    wilson_interval,
)
from glm4_helpers.generation import Answer
from glm4_helpers.profiles import get_profile, profile_settings

EDGE_TEMPLATE = "{% for item in messages %}<|{{ item['role'] }}|>\n{{ item['content'] }}{% endfor %}<|assistant|>"
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


# Free text: the profiles whose rows have no single right answer, on a tiny model with the 9B's settings


ROWS = [
    {"instruction": f"{number}的名字？", "input": "" if number % 2 else "天地", "output": f"苹果{number}。"}
    for number in range(100, 180)
]


@pytest.fixture(scope="module")
def free_text_course(tmp_path_factory):
    """A course folder with two tiny models, as weights/glm-4-9b-hf and -chat-hf, rows in Alpaca's form, an adapter."""
    folder = tmp_path_factory.mktemp("course")
    tokenizer = tiny_tokenizer()
    for name, seed in (("glm-4-9b-hf", 0), ("glm-4-9b-chat-hf", 1)):
        save_model(folder / "weights" / name, tiny_glm(tokenizer, seed).to(torch.bfloat16), tokenizer)
    (folder / "data").mkdir()
    (folder / "data" / "rows.json").write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLM4_HOME", str(folder))
        profile = free_text_profile()
        save_live_adapter(folder / "adapter", profile, std=0.2)
    return folder


def free_text_profile(name="glm-4-9b-lora", **settings):
    return get_profile(name, train_data="data/rows.json", dev_fraction=0.3, **{"training.max_length": 64}, **settings)


@pytest.fixture
def course(free_text_course, monkeypatch):
    monkeypatch.setenv("GLM4_HOME", str(free_text_course))
    return free_text_course


def spy_on_loading(monkeypatch):
    loaded = []
    load = evaluation.load_base_model

    def spy(profile, dtype=None):
        model = load(profile, dtype)
        loaded.append((Path(profile.base_model).name, model.dtype))
        return model

    monkeypatch.setattr(evaluation, "load_base_model", spy)
    return loaded


def test_free_text_is_scored_on_rows_that_training_keeps_out(course):
    profile = free_text_profile()
    tokenizer = models.load_tokenizer(profile)
    chosen = [json.dumps(row["messages"]) for row in read_free_text(profile, tokenizer, 10)["held_out_rows"]]
    train, dev = training._messages(profile)
    assert len(set(chosen)) == 10
    assert not set(chosen) & {json.dumps(messages) for messages in train["messages"]}
    assert set(chosen) <= {json.dumps(messages) for messages in dev["messages"]}
    again = [json.dumps(row["messages"]) for row in read_free_text(profile, tokenizer, 5)["held_out_rows"]]
    assert again == chosen[:5], "fewer rows are the first of the same"


def test_an_adapter_is_scored_on_the_rows_that_its_own_training_held_out(course, monkeypatch, tmp_path):
    profile, other = free_text_profile(), free_text_profile(**{"training.seed": 7})
    shutil.copytree(course / "adapter", tmp_path / "adapter")
    record = {"facts": {"profile": profile_settings(other)}}
    (tmp_path / "adapter" / "training.json").write_text(json.dumps(record), encoding="utf-8")
    scored = []
    monkeypatch.setattr(evaluation, "scores", lambda model, tokenizer, held_out, *rest: scored.append(held_out))
    evaluation.before_after(profile, tmp_path / "adapter")
    tokenizer = models.load_tokenizer(profile)
    assert scored[0] == read_free_text(other, tokenizer) != read_free_text(profile, tokenizer)


def test_rows_that_training_would_drop_are_not_scored(course):
    profile = free_text_profile()
    tokenizer = models.load_tokenizer(profile)
    longest = max(len(chat_format.encode(tokenizer, to_messages(row))["input_ids"]) for row in ROWS)
    tight = get_profile("glm-4-9b-lora", train_data="data/rows.json", dev_fraction=0.3, **{"training.max_length": longest - 1})
    rows = read_free_text(tight, tokenizer)["held_out_rows"]
    assert 0 < len(rows) < len(read_free_text(profile, tokenizer)["held_out_rows"])
    with pytest.raises(DataError, match="holds no rows out"):
        read_free_text(get_profile("glm-4-9b-lora", train_data="data/rows.json", dev_fraction=0.0), tokenizer)


def test_evaluate_scores_free_text_in_the_profiles_dtype_with_the_chat_model_beside(course, monkeypatch, capsys):
    loaded = spy_on_loading(monkeypatch)
    line = ["evaluate", "--profile", "glm-4-9b-lora", "--adapter", str(course / "adapter"), "--rows", "6"]
    settings = ["--set", "train_data=data/rows.json", "--set", "dev_fraction=0.3", "--set", "training.max_length=48"]
    assert main([*line, *settings, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert loaded == [("glm-4-9b-hf", torch.bfloat16), ("glm-4-9b-chat-hf", torch.bfloat16)]
    assert result["half"] == "held-out" and result["baseline"]["name"] == "glm-4-9b-chat-hf"
    losses = [result[side]["sets"]["held_out_rows"]["loss"] for side in ("before", "after", "baseline")]
    assert len(set(losses)) == 3 and all(loss > 0 for loss in losses)
    assert len(result["after"]["sets"]["held_out_rows"]["answers"]) == 6
    table = format_table(result)
    assert "perplexity" in table and "glm-4-9b-chat-hf" in table and "cloze" not in table
    assert f"{math.exp(losses[1]):.2f}" in table
    assert table.splitlines()[-1].startswith("6 rows of free text that training held out")
    assert main([*line, *settings, "--baseline", "none"]) == 0
    assert "chat-hf" not in capsys.readouterr().out


def test_a_profile_without_lora_compares_two_whole_models(course, monkeypatch):
    loaded = spy_on_loading(monkeypatch)
    profile = free_text_profile("glm-4-9b-full")
    result = before_after(profile, course / "weights" / "glm-4-9b-chat-hf", row_count=3)
    assert [name for name, _ in loaded] == ["glm-4-9b-hf", "glm-4-9b-chat-hf"]
    before, after = (result[side]["sets"]["held_out_rows"]["loss"] for side in ("before", "after"))
    assert before != after


def test_the_baseline_keeps_its_own_template_and_ends_as_it_was_trained(course, tmp_path):
    edge = tiny_tokenizer()
    edge.chat_template = EDGE_TEMPLATE
    folder = save_model(tmp_path / "edge-chat", tiny_glm(edge).to(torch.bfloat16), edge)
    before = (folder / "chat_template.jinja").read_text()
    profile = free_text_profile()
    baseline = find_baseline(profile, str(folder))
    result = before_after(profile, course / "adapter", row_count=2, baseline=baseline)
    rows = read_free_text(profile, edge, 2)["held_out_rows"]
    own = models.load_base_model(evaluation.baseline_profile(profile, baseline))
    wanted = evaluate_rows(own, models.load_tokenizer(evaluation.baseline_profile(profile, baseline)), rows, 4, 64, "<|user|>")
    assert result["baseline"]["sets"]["held_out_rows"]["loss"] == pytest.approx(wanted.loss)
    assert (folder / "chat_template.jinja").read_text() == before


def test_a_baseline_is_a_folder_a_name_or_a_profile_and_else_an_error(course):
    profile = free_text_profile()
    wanted = (course / "weights" / "glm-4-9b-chat-hf").resolve()
    assert find_baseline(profile) == find_baseline(profile, "glm-4-9b-chat-hf") == find_baseline(profile, str(wanted)) == wanted
    assert find_baseline(profile, "glm-4-9b-qlora") == (course / "weights" / "glm-4-9b-hf").resolve()
    assert find_baseline(get_profile("glm-edge-1.5b")) is None
    with pytest.raises(ModelError, match="no model to compare with") as error:
        find_baseline(profile, "nowhere")
    assert "--repository zai-org/glm-4-9b-chat-hf" in error.value.fix


def test_glm4_nano_is_scored_in_float32(monkeypatch, tmp_path):
    seen = []

    def stop(profile, dtype=None):
        seen.append(dtype)
        raise ModelError("far enough", "none")

    monkeypatch.setattr(evaluation, "load_base_model", stop)
    monkeypatch.setattr(evaluation, "check_adapter", lambda *_: None)
    with pytest.raises(ModelError, match="far enough"):
        before_after(get_profile("glm4-nano"), tmp_path)
    assert seen == [torch.float32]
