"""Scoring: what counts as right, intervals, loss, and scores that do not depend on the batch size."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from tiny_models import save_live_adapter, save_model, tiny_glm, tiny_tokenizer

from glm4_helpers import chat_format, evaluation, generation, models
from glm4_helpers.cli.main import main
from glm4_helpers.data import to_messages
from glm4_helpers.evaluation import (
    Rate,
    assistant_token_loss,
    before_after,
    check_answer,
    cloze_accuracy,
    evaluate_rows,
    find_baseline,
    format_table,
    is_right,
    paired_test,
    score_as_text,
    wilson_interval,
    wording_bootstrap,
)
from glm4_helpers.generation import Answer
from glm4_helpers.held_out import read_free_text, read_held_out, read_plain, train_and_dev, training_overlap
from glm4_helpers.profiles import get_profile, profile_settings
from glm4_helpers.support.errors import DataError, ModelError, SettingError

EDGE_TEMPLATE = "{% for item in messages %}<|{{ item['role'] }}|>\n{{ item['content'] }}{% endfor %}<|assistant|>"
FRUIT = {
    "type": "distinct_of",
    "count": 2,
    "members": ["苹果", "香蕉", "桃子"],
    "prefix": "",
    "suffix": "。",
    "separator": "、",
}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("苹果、桃子。", True),
        ("苹果、苹果。", False),
        ("苹果。", False),
        ("苹果、汽车。", False),
        ("苹果、桃子", False),
        ("", False),
    ],
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


def test_a_rate_counts_and_knows_its_interval():
    rate = Rate.of([True, False, True, True])
    assert (rate.right, rate.total, rate.value) == (3, 4, 0.75)
    assert rate.interval == wilson_interval(3, 4)
    assert rate.as_dict() == {
        "right": 3,
        "total": 4,
        "accuracy": 0.75,
        "low": rate.interval[0],
        "high": rate.interval[1],
    }
    assert str(rate) == "75.0% [30.1%, 95.4%]"
    assert Rate.of([]).value == 0.0


def outcomes(both, lost, gained, neither):
    """Right or wrong on the same rows, before and after."""
    pairs = [(True, True)] * both + [(True, False)] * lost + [(False, True)] * gained + [(False, False)] * neither
    return [list(side) for side in zip(*pairs)]


def test_the_paired_test_against_published_values():
    # Fagerland, Lydersen and Laake 2013 (BMC Med. Res. Methodol. 13:91), table 1: 1, 1, 7, 12; exact p 0.070.
    assert paired_test(*outcomes(1, 1, 7, 12)) == {"gained": 7, "lost": 1, "p_value": pytest.approx(0.0703125)}
    # statsmodels' documentation of mcnemar(exact=True): [[101, 121], [59, 33]] gives 4.434e-06.
    assert paired_test(*outcomes(101, 121, 59, 33))["p_value"] == pytest.approx(4.434e-06, rel=1e-3)
    assert paired_test(*outcomes(5, 0, 0, 5))["p_value"] == 1.0
    assert paired_test(*outcomes(0, 3, 3, 0))["p_value"] == 1.0
    with pytest.raises(ValueError):
        paired_test([True], [True, False])
    with pytest.raises(DataError, match="neither right nor wrong"):
        paired_test([True, None], [True, None])


def test_intervals_may_overlap_where_the_paired_test_tells_two_models_apart():
    before, after = outcomes(864, 36, 64, 36)
    assert (sum(before), sum(after), len(before)) == (900, 928, 1000)
    assert wilson_interval(900, 1000)[1] > wilson_interval(928, 1000)[0]
    assert paired_test(before, after)["p_value"] == pytest.approx(0.0066, abs=1e-4)
    assert paired_test(*outcomes(900, 0, 28, 72))["p_value"] == 2 / 2**28


def test_the_bootstrap_draws_wordings_and_not_rows():
    right = [True] * 9 + [False]
    alone = wording_bootstrap(right, range(10))
    assert wording_bootstrap(right * 20, [*range(10)] * 20) == alone, "more rows of the same wordings tell nothing new"
    by_row = wording_bootstrap(right * 20, range(200))
    assert by_row[1] - by_row[0] < 0.4 * (alone[1] - alone[0])
    # Of many wordings with one row each it is the interval of a fraction: 0.9 +- 1.96 * sqrt(0.9 * 0.1 / 1000).
    assert wording_bootstrap(right * 100, range(1000)) == pytest.approx((0.8814, 0.9186), abs=2e-3)
    assert wording_bootstrap([1, -1] * 50, range(100), seed=3) == wording_bootstrap([1, -1] * 50, range(100), seed=3)
    with pytest.raises(DataError, match="same wording"):
        wording_bootstrap(right, ["我是X"] * 10)


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
    one, seven, many = (
        evaluate_rows(nano_model, nano_tokenizer, rows, size, answer_batch_size=size) for size in (1, 7, 64)
    )
    assert one.answers == seven.answers == many.answers
    assert one.accuracy == many.accuracy
    assert one.loss == pytest.approx(many.loss, rel=1e-5)


def test_cloze_takes_the_answer_only_where_the_sentence_ends(nano_model, nano_tokenizer):
    facts = read_plain("cloze")[:40]
    figures = cloze_accuracy(nano_model, nano_tokenizer, facts)
    nonsense = cloze_accuracy(nano_model, nano_tokenizer, [{**fact, "answers": ["不"]} for fact in facts])
    assert figures["all"]["right"] > 30
    assert nonsense["all"]["right"] == 0


def test_rows_without_a_check_are_judged_by_loss_stop_rate_and_exact_match(nano_model, nano_tokenizer):
    rows = [{"instruction": "写一首诗。", "input": "", "output": "好。"}]
    scored = evaluate_rows(nano_model, nano_tokenizer, rows, max_new_tokens=8)
    assert scored.accuracy is None and scored.loss > 0 and 0 <= scored.stop_rate <= 1 and scored.exact.total == 1
    assert to_messages(rows[0])[0]["role"] == "user"


def test_absent_held_out_rows_and_adapters_are_named(tmp_path, monkeypatch):
    profile = get_profile("glm4-nano", test_data="data/nowhere")
    with pytest.raises(DataError, match="data/nowhere was not found"):
        read_held_out(profile, "test")
    with pytest.raises(SettingError, match="no dev_data") as error:
        read_held_out(get_profile("glm-4-9b-lora"), "dev")
    assert "--set dev_data=" in error.value.fix
    with pytest.raises(ModelError, match="adapter"):
        before_after(get_profile("glm4-nano"), tmp_path / "none")
    shutil.copytree(ROOT / "data" / "test", tmp_path / "data" / "test")
    (tmp_path / "data" / "test" / "second_turns.json").unlink()
    monkeypatch.setenv("GLM4_HOME", str(tmp_path))
    with pytest.raises(DataError, match="second_turns.json is not there") as error:
        read_held_out(get_profile("glm4-nano"), "test")
    assert "git checkout" in error.value.fix


def test_the_courses_sets_come_from_easy_to_hard_and_no_question_was_trained():
    profile = get_profile("glm4-nano")
    for half, rows in (("dev", 562), ("test", 1069)):
        sets = read_held_out(profile, half)
        assert list(sets) == ["unseen_rows", "unseen_entities", "unseen_phrasings", "second_turns"]
        assert sum(map(len, sets.values())) == rows
        assert training_overlap(profile, sets) == 0


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
    assert table.splitlines()[-1].startswith("2 held-out rows of the test set")


# Free text: the profiles whose rows have no single right answer, on a tiny model with the 9B's settings


ROWS = [
    {"instruction": f"{number}的名字？", "input": "" if number % 2 else "天地", "output": f"苹果{number}。"}
    for number in range(100, 180)
]


def test_the_base_model_answers_in_plain_text_what_it_cannot_in_the_chat_format(nano_model, nano_tokenizer):
    """With earlier turns, a system prompt and an answer of several lines; a wrong check stays wrong."""
    rows = read_held_out(get_profile("glm4-nano"), "dev")
    asked = {
        "several lines": [row for row in rows["unseen_rows"] if row["kind"] == "plan"],
        "one line": rows["unseen_rows"][:8],
        "earlier turns": rows["second_turns"][:8],
        "system": [row for row in rows["unseen_rows"] if row.get("system")],
        "wrong": [{**row, "check": {"type": "exact", "answers": ["错"]}} for row in rows["unseen_rows"][:2]],
    }
    scored = score_as_text(nano_model, nano_tokenizer, asked)["sets"]
    assert {name: len(side["answers"]) for name, side in scored.items()} == {name: len(asked[name]) for name in asked}
    for name in ("several lines", "one line", "earlier turns", "system"):
        assert scored[name]["accuracy"]["right"] > 0, name
        assert any(answer["right"] and "\n" in answer["answer"] for answer in scored[name]["answers"]) == (
            name == "several lines"
        )
    assert scored["wrong"]["accuracy"]["right"] == 0
    chat = evaluate_rows(nano_model, nano_tokenizer, asked["one line"], max_new_tokens=64).accuracy
    assert chat.right < scored["one line"]["accuracy"]["right"]


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
    load = models.load_base_model

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
    train, dev = train_and_dev(profile)
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
    monkeypatch.setattr(evaluation, "score_model", lambda profile, model, tokenizer, held_out: scored.append(held_out))
    evaluation.before_after(profile, tmp_path / "adapter")
    tokenizer = models.load_tokenizer(profile)
    assert scored[0] == read_free_text(other, tokenizer) != read_free_text(profile, tokenizer)


def test_rows_that_training_would_drop_are_not_scored(course):
    profile = free_text_profile()
    tokenizer = models.load_tokenizer(profile)
    longest = max(len(chat_format.encode(tokenizer, to_messages(row))["input_ids"]) for row in ROWS)
    tight = get_profile(
        "glm-4-9b-lora", train_data="data/rows.json", dev_fraction=0.3, **{"training.max_length": longest - 1}
    )
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
    assert "held_out_rows (exact match)" in table
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
    wanted = evaluate_rows(
        own, models.load_tokenizer(evaluation.baseline_profile(profile, baseline)), rows, 4, 64, "<|user|>"
    )
    assert result["baseline"]["sets"]["held_out_rows"]["loss"] == pytest.approx(wanted.loss)
    assert (folder / "chat_template.jinja").read_text() == before


def test_a_baseline_is_a_folder_a_name_or_a_profile_and_else_an_error(course):
    profile = free_text_profile()
    wanted = (course / "weights" / "glm-4-9b-chat-hf").resolve()
    assert (
        find_baseline(profile)
        == find_baseline(profile, "glm-4-9b-chat-hf")
        == find_baseline(profile, str(wanted))
        == wanted
    )
    assert find_baseline(profile, "glm-4-9b-qlora") == (course / "weights" / "glm-4-9b-hf").resolve()
    assert find_baseline(get_profile("glm-edge-1.5b")) is None
    with pytest.raises(ModelError, match="no model to compare with") as error:
        find_baseline(profile, "nowhere")
    assert "--repository zai-org/glm-4-9b-chat-hf" in error.value.fix


def test_the_chat_model_to_compare_with_is_a_setting_of_the_profile(course):
    wanted = (course / "weights" / "glm-4-9b-hf").resolve()
    assert find_baseline(get_profile("glm-edge-1.5b", chat_model="weights/glm-4-9b-hf")).resolve() == wanted
    assert find_baseline(free_text_profile(chat_model=None)) is None


def test_answers_and_loss_have_batches_of_their_own(course, monkeypatch):
    sizes = {"answers": [], "loss": []}
    answer, loss = generation.answers, evaluation.assistant_token_loss

    def spy_answers(*arguments, batch_size, **keywords):
        sizes["answers"].append(batch_size)
        return answer(*arguments, batch_size=batch_size, **keywords)

    def spy_loss(model, tokenizer, conversations, batch_size, terminator):
        sizes["loss"].append(batch_size)
        return loss(model, tokenizer, conversations, batch_size, terminator)

    monkeypatch.setattr(evaluation, "answers", spy_answers)
    monkeypatch.setattr(evaluation, "assistant_token_loss", spy_loss)
    before_after(free_text_profile(), course / "adapter", row_count=3)
    assert sizes == {"answers": [32, 32], "loss": [4, 4]}
    before_after(free_text_profile(answer_batch_size=5), course / "adapter", row_count=3)
    assert sizes["answers"][2:] == [5, 5]


@pytest.mark.parametrize(("free_gib", "rows"), [(10, 32), (2, 25), (0.1, 1), (0, 1)])
def test_fewer_rows_are_answered_at_a_time_where_the_gpu_has_no_room(monkeypatch, free_gib, rows):
    """GLM-4-9B holds 40 KiB of keys and values a token: 2 key/value heads of 128 in 40 layers, in 16 bits."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gib * 2**30), 24 * 2**30))
    config = SimpleNamespace(num_hidden_layers=40, num_key_value_heads=2, head_dim=128)
    model = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, config=config)
    assert evaluation._rows_that_fit(model, 32, 1024) == rows
    model.device = torch.device("cpu")
    assert evaluation._rows_that_fit(model, 32, 1024) == 32


# Rows of one's own


MINE = [
    {"instruction": "1的名字？", "output": "苹果1。", "check": {"type": "one_of", "answers": ["苹果1。", "苹果。"]}},
    {"instruction": "天地是什么？", "output": "天1"},
    {"instruction": "北京？", "output": "中国", "check": None},
    {"instruction": "一二？", "output": "三", "kind": "count"},
]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def evaluate_mine(course, data, *options):
    line = ["evaluate", "--profile", "glm-4-9b-lora", "--adapter", str(course / "adapter"), "--baseline", "none"]
    settings = ["train_data=data/rows.json", "dev_fraction=0.3", "training.max_length=24", f"test_data={data}"]
    return main([*line, *(word for setting in settings for word in ("--set", setting)), *options])


def test_a_file_of_own_rows_is_scored_as_one_set(course, tmp_path, monkeypatch, capsys):
    loaded = spy_on_loading(monkeypatch)
    file = write(tmp_path / "mine.json", [*MINE, *ROWS[:3]])
    assert evaluate_mine(course, file, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert loaded == [("glm-4-9b-hf", torch.bfloat16)], "the profile's own dtype, and no model twice"
    assert list(result["after"]["sets"]) == ["mine"] and "cloze" not in result["after"]
    scored = result["after"]["sets"]["mine"]
    assert (scored["accuracy"]["total"], scored["exact"]["total"], len(scored["answers"])) == (1, 6, 7)
    assert scored["loss"] > 0 and list(scored["kinds"]) == [""]
    assert result["overlap"] == sum(1 for row in ROWS[:3] if is_trained(row))
    assert evaluate_mine(course, file) == 0
    table = capsys.readouterr().out
    for wanted in ("mine (right)", "mine (exact match)", "stop rate", "loss per answer token", "7 held-out rows"):
        assert wanted in table
    assert f"warning: {result['overlap']} of them ask a question of the training rows" in table


def is_trained(row):
    train, _ = train_and_dev(free_text_profile())
    return to_messages(row) in [models_messages(messages) for messages in train["messages"]]


def models_messages(messages):
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def test_exact_match_compares_normalised_text_of_answers_that_ended(monkeypatch, nano_model, nano_tokenizer):
    given = [Answer("苹果。", True, 3), Answer(" 天１\n", True, 3), Answer("中国", False, 2), Answer("三。", True, 2)]
    monkeypatch.setattr(evaluation, "_answers_by_limit", lambda *_: given)
    rows = [dict(row) for row in MINE]
    rows[2].pop("check")
    scored = evaluate_rows(nano_model, nano_tokenizer, rows)
    assert scored.accuracy == Rate(1, 1) and scored.exact == Rate(1, 3)
    assert [record.get("exact") for record in scored.answers] == [None, True, False, False]
    assert [record["right"] for record in scored.answers] == [True, None, None, None]


def test_a_long_accepted_answer_is_not_cut(monkeypatch, nano_model, nano_tokenizer):
    limits = []

    def spy(model, tokenizer, wanted, max_new_tokens, batch_size):
        limits.append((max_new_tokens, len(wanted)))
        return [Answer("", True, 0)] * len(wanted)

    monkeypatch.setattr(evaluation, "answers", spy)
    long = {"instruction": "好？", "output": "好。", "check": {"type": "one_of", "answers": ["好。", "好" * 70]}}
    evaluate_rows(nano_model, nano_tokenizer, [MINE[0], long, MINE[1]], max_new_tokens=150)
    assert limits == [(64, 1), (150, 2)]


def test_a_folder_of_own_rows_gives_a_set_for_each_file(course, tmp_path):
    write(tmp_path / "mine" / "zebra.json", MINE)
    write(tmp_path / "mine" / "apple.json", MINE[:1])
    (tmp_path / "mine" / "apple.jsonl").write_text(json.dumps(MINE[1]) + "\n", encoding="utf-8")
    (tmp_path / "mine" / "README.md").write_text("about the rows")
    (tmp_path / "mine" / ".hidden").write_text("nothing")
    sets = read_held_out(get_profile("glm4-nano", test_data=str(tmp_path / "mine")), "test")
    assert {name: len(rows) for name, rows in sets.items()} == {"apple.json": 1, "apple.jsonl": 1, "zebra": 4}
    assert "check" not in sets["zebra"][2]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no files of rows"):
        read_held_out(get_profile("glm4-nano", test_data=str(tmp_path / "empty")), "test")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"instruction": "好？", "output": ""}, "no answer that follows a question"),
        ({"instruction": "好？", "output": "好", "check": {"type": "fuzzy"}}, "unknown type 'fuzzy'"),
        ({"instruction": "好？", "output": "好", "check": "好"}, "unknown type None"),
        ({"instruction": "好？", "output": "好", "check": {"type": "exact"}}, "check without answers"),
        (
            {"instruction": "好？", "output": "好", "check": {"type": "exact", "answers": "好"}},
            "check without a list of texts",
        ),
        ({"instruction": "好？"}, "'output' is missing"),
    ],
)
def test_own_rows_that_cant_be_scored_are_named_before_anything_is_loaded(
    course, tmp_path, monkeypatch, capsys, row, problem
):
    loaded = spy_on_loading(monkeypatch)
    assert evaluate_mine(course, write(tmp_path / "mine.json", [MINE[0], row])) == 2
    error = capsys.readouterr().err
    assert "mine.json, row 2" in error and problem in error and "Fix:" in error
    assert loaded == []


def test_the_rows_of_an_adapters_own_training_tell_what_is_held_out(course, tmp_path, monkeypatch):
    mine = write(tmp_path / "mine.json", MINE)
    shutil.copytree(course / "adapter", tmp_path / "adapter")
    facts = {"profile": profile_settings(get_profile("glm-4-9b-lora", train_data=str(mine), dev_data=str(mine)))}
    (tmp_path / "adapter" / "training.json").write_text(json.dumps({"facts": facts}), encoding="utf-8")
    monkeypatch.setattr(evaluation, "score_both", lambda *_: ({}, {}))
    profile = free_text_profile(test_data=str(mine))
    assert before_after(profile, tmp_path / "adapter")["overlap"] == 4
    assert before_after(profile, course / "adapter")["overlap"] == 0


def test_training_rows_on_a_hub_are_not_fetched_to_be_compared(course):
    rows = {"mine": MINE[:1]}
    assert training_overlap(get_profile("glm-4-9b-lora"), rows) is None
    side = {"sets": {"mine": {"accuracy": None, "stop_rate": 1.0, "loss": 1.0, "answers": [{}]}}}
    table = format_table({"half": "test", "overlap": None, "before": side, "after": side})
    assert "not known" in table.splitlines()[-1]


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
