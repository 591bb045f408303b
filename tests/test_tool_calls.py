"""Tool calls from rows to answers: glm4-nano, trained for a minute on invented tools, calls the right one."""

import json

import pytest
from conftest import ROOT

from glm4_helpers.datasets import to_messages
from glm4_helpers.generation import answers
from glm4_helpers.models import load_adapter, load_base_model, load_tokenizer
from glm4_helpers.profiles import get_profile
from glm4_helpers.training import train

WORDS = "苹果 香蕉 水果 老师 学生 电脑 手机 桌子 椅子 花园 医生 农民 工人 司机 太阳 月亮 星星 大海 高山 森林 飞机 火车 汽车 雨伞".split()
TOOLS = {
    "get_price": ("word", ("{}多少钱？", "告诉我{}的价格。", "买{}要多少钱？"), "请问{}要多少钱？"),
    "translate": ("word", ("{}的英文是什么？", "把{}翻译成英文。", "{}用英文怎么说？"), "请问{}的英文怎么说？"),
}


def row(name, wording, word):
    argument = TOOLS[name][0]
    call = {"name": name, "arguments": {argument: word}}
    functions = [{"name": name, "parameters": {argument: "string"}} for name, (argument, _, _) in TOOLS.items()]
    turns = [{"from": "human", "value": wording.format(word)}, {"from": "function_call", "value": json.dumps(call)}]
    return {"tools": json.dumps(functions), "conversations": turns}


@pytest.mark.slow
def test_nano_calls_the_right_function_for_words_and_wordings_that_it_has_not_seen(tmp_path, monkeypatch, report):
    monkeypatch.setenv("GLM4_HOME", str(ROOT))
    train_words, held_out = WORDS[:18], WORDS[18:]
    rows = [row(name, wording, word) for name in TOOLS for wording in TOOLS[name][1] for word in train_words]
    (tmp_path / "calls.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    profile = get_profile(
        **{"train_data": str(tmp_path / "calls.json"), "dev_data": None, "training.evaluations_per_run": 0,
           "training.epochs": 8, "sample_prompts": [], "dtype": "float32"}
    )  # fmt: skip
    result = train(profile, tmp_path / "run", tracking_mode="disabled")
    tokenizer = load_tokenizer(profile)
    model = load_adapter(load_base_model(profile, "float32"), result.adapter_dir, profile)
    asked = [row(name, TOOLS[name][2], word) for name in TOOLS for word in held_out]
    conversations = [to_messages(each)[:-1] for each in asked]
    given = answers(model, tokenizer, conversations, max_new_tokens=60)
    wanted = [to_messages(each)[-1] for each in asked]
    right_name = sum(answer.text.startswith(f"{want['metadata']}\n") for answer, want in zip(given, wanted))
    whole = sum(answer.text == f"{want['metadata']}\n{want['content']}" for answer, want in zip(given, wanted))
    report("tool calls", f"{right_name} of {len(given)} call the right function, {whole} with the right arguments")
    assert right_name >= 11 and all(answer.stopped for answer in given), [answer.text for answer in given]
