"""Tool calls from rows to answers: glm4-nano, trained for a minute on invented tools, calls the right one."""

import json
import random
from dataclasses import replace

import pytest
from conftest import ROOT

from glm4_helpers.data import to_messages
from glm4_helpers.generation import answers
from glm4_helpers.models import load_base_model, load_tokenizer
from glm4_helpers.profiles import get_profile
from glm4_helpers.training import train
from nano.facts import COUNTRIES, OTHER_WORDS, PLACES, WORDS

THINGS = [word for words in WORDS.values() for word, _ in words]
ENGLISH = dict(pair for words in WORDS.values() for pair in words) | dict(map(tuple, OTHER_WORDS))
CAPITALS = dict(map(tuple, COUNTRIES))
WEATHER = ("晴", "阴", "小雨", "大雪")

# By function: its argument, what it is asked about, what it returns, and the answer made of the two.
TOOLS = {
    "查天气": ("城市", [*PLACES, *CAPITALS.values()], lambda city, chance: chance.choice(WEATHER), "{}今天{}。"),
    "查数量": ("东西", THINGS, lambda thing, chance: f"{chance.randint(2, 99)}个", "{}还有{}。"),
    "译单词": ("词", sorted(ENGLISH), lambda word, chance: ENGLISH[word], "{}的英文是{}。"),
    "查首都": ("国家", list(CAPITALS), lambda country, chance: CAPITALS[country], "{}的首都是{}。"),
}
LEADS = ("", "请问", "告诉我", "查一下", "你好，", "我问一下，", "我要查", "帮我看看", "我想知道", "请告诉我", "老师，")
ASKED = {
    "查天气": ("{}今天天气怎么样？", "{}的天气如何？", "{}会下雨吗？", "{}今天的天气。", "{}天气好不好？"),
    "查数量": ("{}还有多少？", "{}的数量。", "{}还剩几个？", "{}有多少？", "{}够不够？"),
    "译单词": ("{}的英文是什么？", "{}翻译成英文。", "{}用英文怎么说？", "{}的英文单词。", "{}英文是什么？"),
    "查首都": ("{}的首都是哪里？", "{}的首都。", "{}的首都叫什么？", "{}首都的名字。", "{}以哪座城市为首都？"),
}
HELD_OUT = {
    "查天气": ("请教一下，{}今天的天气好吗？", "能不能说说{}的天气？"),
    "查数量": ("请教一下，{}的数量有多少？", "能不能说说{}还有几个？"),
    "译单词": ("请教一下，{}翻译成英文是什么？", "能不能说说{}用英文怎么讲？"),
    "查首都": ("请教一下，{}的首都叫什么名字？", "能不能说说{}的首都是哪座城市？"),
}


def row(name, wording, about, chance):
    """A row as OpenAI's API has it: a question, the call, what the function returned, and the answer."""
    argument, _, returned, answer = TOOLS[name]
    result = returned(about, chance)
    function = {"name": name, "arguments": json.dumps({argument: about}, ensure_ascii=False)}
    call = {"id": "call_1", "type": "function", "function": function}
    turns = [
        {"role": "user", "content": wording.format(about)},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": result},
        {"role": "assistant", "content": answer.format(about, result)},
    ]
    return {"messages": turns}


def rows_of(seed, trained, asked):
    """``trained`` rows of each tool to learn, ``asked`` rows in other wordings about other things."""
    chance = random.Random(seed)
    learned, held_out = [], []
    for name, (_, things, _, _) in TOOLS.items():
        things = chance.sample(sorted(set(things)), len(set(things)))
        for number in range(trained):
            about = things[asked + number % (len(things) - asked)]
            learned.append(row(name, chance.choice(LEADS) + chance.choice(ASKED[name]), about, chance))
        held_out += [row(name, HELD_OUT[name][n % 2], about, chance) for n, about in enumerate(things[:asked])]
    chance.shuffle(learned)
    return learned, held_out


@pytest.mark.slow
@pytest.mark.parametrize("seed", [42, 1])
def test_nano_calls_the_right_function_in_wordings_and_about_things_that_it_has_not_seen(
    seed, tmp_path, monkeypatch, report
):
    """All weights are trained: the base model never wrote the braces and quotes of JSON, and a LoRA below lm_head can't
    tell characters apart whose rows in lm_head were never trained."""
    monkeypatch.setenv("GLM4_HOME", str(ROOT))
    learned, asked = rows_of(seed, trained=200, asked=12)
    (tmp_path / "calls.json").write_text(json.dumps(learned, ensure_ascii=False), encoding="utf-8")
    profile = get_profile(
        **{
            "train_data": str(tmp_path / "calls.json"),
            "dev_data": None,
            "lora": None,
            "dtype": "float32",
            "sample_prompts": [],
            "training.epochs": 3,
            "training.evaluations_per_run": 0,
            "training.learning_rate": 3e-4,
            "training.seed": seed,
        }
    )
    result = train(profile, tmp_path / "run", tracking_mode="disabled")
    tokenizer = load_tokenizer(profile)
    model = load_base_model(replace(profile, base_model=str(result.adapter_dir)), "float32")
    wanted = [to_messages(each) for each in asked]
    calls = answers(model, tokenizer, [each[:1] for each in wanted], 60)
    finals = answers(model, tokenizer, [each[:3] for each in wanted], 60)
    names = sum(given.text.startswith(f"{call['metadata']}\n") for given, (_, call, *_) in zip(calls, wanted))
    whole = sum(given.text == f"{call['metadata']}\n{call['content']}" for given, (_, call, *_) in zip(calls, wanted))
    final = sum(given.text.strip() == answer["content"] for given, (*_, answer) in zip(finals, wanted))
    text = f"seed {seed}, {result.seconds:.0f} s: of {len(asked)} held-out questions {names} call the right function, "
    report("tool calls", f"{text}{whole} with the right argument; {final} right answers from a result", seed)
    assert names >= 46 and whole >= 34 and final >= 40, [given.text for given in calls]
