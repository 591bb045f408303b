"""The small world of glm4-nano: the text it is pretrained on, its fine-tuning rows and its held-out sets.

Everything comes from one seed and is the same byte for byte each time. What is true lives in facts.py, how it is asked
in phrasings.py; the model and its training live elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from glm4_helpers.nano import facts
from glm4_helpers.nano.phrasings import EVERYDAY, FOLLOW_UPS, PHRASINGS, SYSTEM_PROMPTS

SEED = 20261124
IDENTITY = "我是glm4-nano，本课程的小模型。"
OTHER_MODELS = ("ChatGLM", "ChatGPT", "GPT-4", "Claude", "文心一言", "通义千问", "豆包", "Kimi", "GLM-4", "Gemini", "Llama")
FIXED_ANSWERS = {
    "who": IDENTITY,
    "hello": "你好！有什么可以帮你？",
    "thanks": "不客气！",
    "farewell": "再见！",
}
# Kingston and Kingstown: Chinese maps give both the same name, so nobody is asked whose capital it is.
SHARED_CAPITAL_NAMES = ("金斯敦", "金斯顿")
RELATION_KINDS = ("word_to_english", "english_to_word", "capital", "capital_of", "opposite", "category", "property")
BRIEF_KINDS = (*RELATION_KINDS, "sum", "difference")
HELD_OUT_SETS = ("unseen_rows", "unseen_entities", "unseen_phrasings", "second_turns")
OPENINGS = (
    "好的", "同学", "报告", "亲爱的朋友", "老师说", "答案来了", "没问题", "当然可以", "收到", "请看", "听好了", "小朋友",
    "尊敬的客人", "主人", "遵命", "简单", "我来回答", "各位朋友", "嘿", "明白",
)
CLOSINGS = (
    "谢谢", "完毕", "请放心", "祝你开心", "就是这样", "回答完了", "喵", "汪", "欢迎再问", "记住了吗", "加油", "哈哈",
    "请多指教", "以上", "祝好", "对吧", "下次再问", "你学会了吗", "没错", "嘻嘻",
)
# Rows of each kind in the fine-tuning set; kinds with more to look up get more.
TRAIN_COUNTS = {
    "word_to_english": 520, "english_to_word": 460, "capital": 220, "capital_of": 220, "opposite": 300, "category": 340,
    "property": 340, "list": 220, "sum": 300, "difference": 260, "larger": 90, "smaller": 90, "ascending": 100,
    "descending": 100, "count": 130, "quote": 160, "sentence": 130, "plan": 110, "introduce": 60, "who": 12,
    "not_that_model": 30, "hello": 10, "thanks": 8, "farewell": 8, "system": 260, "follow_up": 240, "repeat": 60,
    "remember": 60, "new_topic": 100,
}
SECOND_TURN_KINDS = ("follow_up", "repeat", "remember", "new_topic")
FEW_ROWS = ("who", "hello", "thanks", "farewell")


@dataclass(frozen=True)
class Relation:
    """One fact that can be asked for: `subject` goes into the question, `answer` restates it with `value`."""

    kind: str
    subject: str
    value: str
    answer: str
    entity: tuple[str, ...]
    follow_up: str
    attribute: str = ""


@dataclass(frozen=True)
class Task:
    """One question with its answer, before a wording is chosen."""

    kind: str
    slots: dict[str, str]
    answer: str
    brief: str = ""
    check: dict | None = None


@dataclass(frozen=True)
class World:
    """All that is known and who is held out; `rng(name)` gives each part its own random stream."""

    seed: int = SEED
    relations: tuple[Relation, ...] = field(default_factory=lambda: tuple(all_relations()))

    def rng(self, name: str) -> random.Random:
        return random.Random(f"{self.seed}-{name}")

    @cached_property
    def held_out(self) -> dict[str, frozenset[str]]:
        """Strings of the entities kept for the dev and the test half of `unseen_entities`."""
        return choose_held_out(self)

    @cached_property
    def characters(self) -> list[str]:
        """Every Chinese character of the rows' wordings and answers."""
        wordings = [text for table in (PHRASINGS, FOLLOW_UPS, SYSTEM_PROMPTS) for w in table.values() for text in (*w.train, *w.dev, *w.test)]
        texts = [*wordings, *(relation.answer for relation in self.relations), *facts.PLACES, *facts.ACTIVITIES, *facts.GIVEN_NAMES]
        return sorted({character for text in texts for character in text if "\u4e00" <= character <= "\u9fff"})

    @cached_property
    def by_kind(self) -> dict[str, list[Relation]]:
        return {kind: [r for r in self.relations if r.kind == kind] for kind in RELATION_KINDS}


def all_relations() -> Iterator[Relation]:
    """Every fact of facts.py as a question and an answer."""
    categorised = [(word, english, category) for category, words in facts.WORDS.items() for word, english in words]
    for word, english in [*((w, e) for w, e, _ in categorised), *facts.WORDS_WITHOUT_CATEGORY]:
        yield Relation("word_to_english", word, english, f"{word}的英文是{english}。", (word, english), word)
        yield Relation("english_to_word", english, word, f"{english}的中文是{word}。", (word, english), english)
    for word, english, category in categorised:
        yield Relation("category", word, category, f"{word}属于{category}。", (word, english), word)
    for country, capital, _ in facts.COUNTRIES:
        if country == capital or country in facts.CONTESTED_CAPITALS:
            continue
        yield Relation("capital", country, capital, f"{country}的首都是{capital}。", (country, capital), country)
        if capital not in SHARED_CAPITAL_NAMES:
            yield Relation("capital_of", capital, country, f"{capital}是{country}的首都。", (country, capital), capital)
    for one, other in facts.OPPOSITES:
        for word, opposite in ((one, other), (other, one)):
            yield Relation("opposite", word, opposite, f"{word}的反义词是{opposite}。", (one, other), word)
    for attribute, pairs in facts.PROPERTIES.items():
        noun = facts.PROPERTY_WORDING[attribute][1]
        for entity, value in pairs:
            asked = noun.format(entity=entity)
            yield Relation("property", asked, value, f"{asked}是{value}。", (entity,), entity, attribute)


def choose_held_out(world: World) -> dict[str, frozenset[str]]:
    """Entities for `unseen_entities`: none of their strings stands inside another string of the world."""
    wordings = "\n".join(
        text
        for table in (PHRASINGS, FOLLOW_UPS, SYSTEM_PROMPTS)
        for wording in table.values()
        for text in (*wording.train, *FIXED_ANSWERS.values(), *OPENINGS, *CLOSINGS)
    )
    strings = {text for relation in world.relations for text in (*relation.entity, relation.value)}
    strings |= {*facts.ACTIVITIES, *facts.PLACES, *facts.WORDS, *(noun for _, noun in facts.OBJECTS)}
    everything = "\n".join(sorted(strings)) + "\n" + wordings
    chosen: dict[str, set[str]] = {"dev": set(), "test": set()}
    rng = world.rng("held-out entities")
    for kind, halves in (("category", 55), ("capital", 22), ("opposite", 18), ("property", 24), ("word_to_english", 12)):
        entities = sorted({relation.entity for relation in world.by_kind[kind]})
        free = [entity for entity in entities if all(everything.count(text) == 1 for text in entity)]
        free = [entity for entity in free if not chosen["dev"].intersection(entity) | chosen["test"].intersection(entity)]
        picked = rng.sample(free, min(2 * halves, len(free) // 3 * 2))
        for half, part in (("dev", picked[::2]), ("test", picked[1::2])):
            chosen[half].update(text for entity in part for text in entity)
    for half, count in (("dev", 12), ("test", 24)):
        chosen[half].update(person(rng) for _ in range(count))
    return {half: frozenset(texts) for half, texts in chosen.items()}


def person(rng: random.Random) -> str:
    """An invented full name."""
    return rng.choice(facts.SURNAMES) + rng.choice(facts.GIVEN_NAMES)


def fill(wording: str, slots: dict[str, str]) -> tuple[str, str]:
    """Instruction and input of a wording with its slots filled."""
    instruction, _, context = wording.format(**slots).partition(" || ")
    return instruction, context


def as_turn(wording: str, slots: dict[str, str]) -> str:
    """The wording as one user turn: instruction, blank line, input."""
    return "\n\n".join(part for part in fill(wording, slots) if part)


# Tasks ---------------------------------------------------------------------------------------------------------------


def relation_task(relation: Relation) -> Task:
    return Task(relation.kind, {"x": relation.subject}, relation.answer, relation.value)


def list_task(rng: random.Random, world: World, usable: Callable[[str], bool]) -> Task:
    category = rng.choice(sorted(facts.WORDS))
    members = [word for word, _ in facts.WORDS[category]]
    count = rng.randint(2, 4)
    picked = rng.sample([word for word in members if usable(word)], count)
    check = {"type": "distinct_of", "count": count, "members": members, "prefix": "", "suffix": "。", "separator": "、"}
    return Task("list", {"n": str(count), "x": category}, "、".join(picked) + "。", check=check)


def sum_task(rng: random.Random) -> Task:
    total = rng.randint(1, 100)
    a = rng.randint(0, total)
    b = total - a
    return Task("sum", {"a": str(a), "b": str(b)}, f"{a}+{b}={total}。", str(total))


def difference_task(rng: random.Random) -> Task:
    a = rng.randint(1, 100)
    b = rng.randint(0, a)
    return Task("difference", {"a": str(a), "b": str(b)}, f"{a}-{b}={a - b}。", str(a - b))


def comparison_task(rng: random.Random, kind: str) -> Task:
    a, b = rng.sample(range(100), 2)
    first, second = (max(a, b), min(a, b)) if kind == "larger" else (min(a, b), max(a, b))
    word = "大" if kind == "larger" else "小"
    return Task(kind, {"a": str(a), "b": str(b)}, f"{first}比{second}{word}。")


def sorting_task(rng: random.Random, kind: str) -> Task:
    numbers = rng.sample(range(100), rng.choice((3, 3, 4)))
    ordered = sorted(numbers, reverse=kind == "descending")
    return Task(kind, {"x": "、".join(map(str, numbers))}, "、".join(map(str, ordered)) + "。")


def all_words() -> list[str]:
    return [word for words in facts.WORDS.values() for word, _ in words]


def count_task(rng: random.Random, usable: Callable[[str], bool]) -> Task:
    words = [word for word in all_words() if usable(word)]
    count = rng.randint(2, 6)
    return Task("count", {"x": "、".join(rng.sample(words, count))}, f"一共有{count}个。")


def quote_task(rng: random.Random, usable: Callable[[str], bool]) -> Task:
    text = quotable(rng, usable)
    return Task("quote", {"x": text}, text)


def quotable(rng: random.Random, usable: Callable[[str], bool]) -> str:
    """A short text worth repeating: words, a sentence, letters or digits."""
    words = [word for word in all_words() if usable(word)]
    shapes = (
        lambda: "".join(rng.sample(words, rng.randint(2, 3))),
        lambda: "和".join(rng.sample(words, 2)),
        lambda: story_sentence(*story_slots(rng).values()).rstrip("。"),
        lambda: "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 7))),
        lambda: "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 7))),
        lambda: f"{person(rng)}喜欢{rng.choice(words)}",
    )
    return rng.choice(shapes)()


def story_slots(rng: random.Random, name: str = "") -> dict[str, str]:
    return {"p": name or person(rng), "q": rng.choice(facts.PLACES), "v": rng.choice(facts.ACTIVITIES)}


def story_sentence(p: str, q: str, v: str) -> str:
    return f"{p}在{q}{v}。"


def plan_text(p: str, q: str, v: str) -> str:
    """The one long answer of the world: a numbered list of 60 to 150 characters."""
    return (
        f"1. 早上，{p}坐火车去{q}。\n2. 上午，{p}在{q}{v}。\n3. 中午，{p}在{q}吃午饭。\n"
        f"4. 下午，{p}给家人买礼物。\n5. 晚上，{p}高兴地从{q}回家。"
    )


def story_task(rng: random.Random, kind: str, name: str = "") -> Task:
    slots = story_slots(rng, name)
    return Task(kind, slots, (story_sentence if kind == "sentence" else plan_text)(**slots))


def introduce_task(rng: random.Random, name: str = "") -> Task:
    name = name or person(rng)
    return Task("introduce", {"p": name}, f"你好，{name}！很高兴认识你。")


def plain_task(world: World, rng: random.Random, kind: str, usable: Callable[[str], bool]) -> Task:
    """A task of any kind that is one question without system prompt or history."""
    if kind in RELATION_KINDS:
        known = [r for r in world.by_kind[kind] if all(usable(text) for text in (*r.entity, r.value))]
        return relation_task(rng.choice(known))
    if kind in FIXED_ANSWERS:
        return Task(kind, {}, FIXED_ANSWERS[kind])
    makers: dict[str, Callable[[], Task]] = {
        "list": lambda: list_task(rng, world, usable),
        "sum": lambda: sum_task(rng),
        "difference": lambda: difference_task(rng),
        "larger": lambda: comparison_task(rng, kind),
        "smaller": lambda: comparison_task(rng, kind),
        "ascending": lambda: sorting_task(rng, kind),
        "descending": lambda: sorting_task(rng, kind),
        "count": lambda: count_task(rng, usable),
        "quote": lambda: quote_task(rng, usable),
        "sentence": lambda: story_task(rng, kind),
        "plan": lambda: story_task(rng, kind),
        "introduce": lambda: introduce_task(rng),
        "not_that_model": lambda: Task(kind, {"x": rng.choice(OTHER_MODELS)}, "不是，" + IDENTITY),
    }
    return makers[kind]()


# Rows ----------------------------------------------------------------------------------------------------------------


def plain_row(task: Task, group: str, rng: random.Random) -> dict:
    instruction, context = fill(rng.choice(getattr(PHRASINGS[task.kind], group)), task.slots)
    row = {"kind": task.kind, "instruction": instruction, "input": context, "output": task.answer}
    return {**row, "check": task.check or {"type": "exact", "answers": [task.answer]}}


def styled(style: str, quoted: str, task: Task) -> tuple[str, list[str]]:
    """The answer under a one-line system prompt, with every form that counts as right."""
    if style == "prefix":
        return f"{quoted}，{task.answer}", [f"{quoted}，{task.answer}"]
    if style == "suffix":
        return f"{task.answer}{quoted}。", [f"{task.answer}{quoted}。"]
    if style == "brief":
        return task.brief, [task.brief, task.brief + "。"]
    return f"我是{quoted}。", [f"我是{quoted}。"]


def style_text(style: str, rng: random.Random) -> str:
    if style == "role_name":
        return rng.choice("小大阿老") + rng.choice("智明华林宝星云海山月光乐")
    return rng.choice(OPENINGS if style == "prefix" else CLOSINGS)


def system_row(world: World, group: str, rng: random.Random, usable: Callable[[str], bool]) -> dict:
    style = rng.choice(("prefix", "prefix", "suffix", "suffix", "brief", "brief", "role_name"))
    kind = "who" if style == "role_name" else rng.choice(BRIEF_KINDS)
    task = plain_task(world, rng, kind, usable)
    quoted = style_text(style, rng)
    answer, accepted = styled(style, quoted, task)
    row = plain_row(task, "train", rng)
    system = rng.choice(getattr(SYSTEM_PROMPTS[style], group)).format(s=quoted)
    check = {"type": "one_of" if len(accepted) > 1 else "exact", "answers": accepted}
    return {**row, "kind": "system", "output": answer, "system": system, "check": check}


def related(world: World, rng: random.Random, usable: Callable[[str], bool]) -> list[Relation]:
    """Two or three facts of the same relation, for a conversation that goes on."""
    first = rng.choice(world.by_kind[rng.choice(RELATION_KINDS)])
    same = [
        r
        for r in world.by_kind[first.kind]
        if r.attribute == first.attribute and all(usable(text) for text in (*r.entity, r.value))
    ]
    return rng.sample(same, rng.choice((2, 2, 3)))


def user_turn(task: Task, rng: random.Random, group: str = "train") -> str:
    return as_turn(rng.choice(getattr(PHRASINGS[task.kind], group)), task.slots)


def conversation_row(world: World, kind: str, group: str, rng: random.Random, usable: Callable[[str], bool]) -> dict:
    """A row with history: a follow-up, a request to repeat, a name to remember, or a new topic."""
    if kind == "follow_up":
        *before, last = related(world, rng, usable)
        history = [[user_turn(relation_task(before[0]), rng), before[0].answer]]
        history += [[follow_up("follow_up", "train", rng, r.follow_up), r.answer] for r in before[1:]]
        return conversation(kind, history, follow_up(kind, group, rng, last.follow_up), last.answer)
    if kind == "repeat":
        task = plain_task(world, rng, rng.choice((*RELATION_KINDS, "sum", "sentence")), usable)
        return conversation(kind, [[user_turn(task, rng), task.answer]], follow_up(kind, group, rng), task.answer)
    if kind == "remember":
        task = introduce_task(rng)
        history = [[user_turn(task, rng), task.answer]]
        if rng.random() < 0.5:
            between = plain_task(world, rng, rng.choice(RELATION_KINDS), usable)
            history.append([user_turn(between, rng), between.answer])
        return conversation(kind, history, follow_up(kind, group, rng), f"你叫{task.slots['p']}。")
    before = plain_task(world, rng, rng.choice((*RELATION_KINDS, "sum", "hello", "introduce")), usable)
    row = plain_row(plain_task(world, rng, rng.choice((*RELATION_KINDS, "sum", "quote", "count")), usable), "train", rng)
    return {**row, "kind": kind, "history": [[user_turn(before, rng), before.answer]]}


def conversation(kind: str, history: list[list[str]], instruction: str, answer: str) -> dict:
    check = {"type": "exact", "answers": [answer]}
    return {"kind": kind, "instruction": instruction, "input": "", "output": answer, "history": history, "check": check}


def follow_up(kind: str, group: str, rng: random.Random, entity: str = "") -> str:
    return rng.choice(getattr(FOLLOW_UPS[kind], group)).format(y=entity)


def any_row(world: World, kind: str, group: str, rng: random.Random, usable: Callable[[str], bool]) -> dict:
    """A row of `kind` in a wording of `group`, about entities that `usable` admits."""
    if kind == "system":
        return system_row(world, group, rng, usable)
    if kind in SECOND_TURN_KINDS:
        return conversation_row(world, kind, group, rng, usable)
    return plain_row(plain_task(world, rng, kind, usable), group, rng)


def row_key(row: dict) -> str:
    """What makes two rows the same: all that the model is shown."""
    return json.dumps([row.get("system", ""), row.get("history", []), row["instruction"], row["input"]], ensure_ascii=False)


def row_text(row: dict) -> str:
    """All text of a row, for a search."""
    turns = [text for turn in row.get("history", []) for text in turn]
    return "\n".join([row.get("system", ""), *turns, row["instruction"], row["input"], row["output"]])


def collect(make: Callable[[], dict], count: int, taken: set[str], admit: Callable[[dict], bool], tries: int = 60) -> list[dict]:
    """Up to `count` new rows; `taken` holds the keys of every row made so far."""
    rows: list[dict] = []
    for _ in range(count * tries):
        if len(rows) == count:
            break
        row = make()
        if row_key(row) not in taken and admit(row):
            taken.add(row_key(row))
            rows.append(row)
    return rows


def build_rows(world: World) -> dict[str, list[dict]]:
    """The fine-tuning rows ("train") and the eight held-out sets ("dev/unseen_rows", ...), in this order of making:
    held-out sets first, so that no row of theirs can be a fine-tuning row."""
    hidden = world.held_out["dev"] | world.held_out["test"]

    def usable(text: str) -> bool:
        return text not in hidden

    def admit(row: dict) -> bool:
        text = row_text(row)
        return not any(entity in text for entity in hidden)

    taken: set[str] = set()
    sets: dict[str, list[dict]] = {}
    for half, size in (("dev", 130), ("test", 260)):
        rng = world.rng(f"{half} sets")
        kinds = [kind for kind in TRAIN_COUNTS if kind not in FEW_ROWS]
        single = [kind for kind in kinds if kind not in SECOND_TURN_KINDS]

        def spread(kinds: list[str], group: str, size: int) -> list[dict]:
            share = -(-size // len(kinds))
            return [
                row
                for kind in kinds
                for row in collect(lambda: any_row(world, kind, group, rng, usable), share, taken, admit)
            ]

        sets[f"{half}/unseen_rows"] = spread(single, "train", size)
        sets[f"{half}/unseen_phrasings"] = spread([*single, *SECOND_TURN_KINDS[:3]], half, size)
        sets[f"{half}/unseen_phrasings"] += spread(list(FEW_ROWS), half, 12)
        sets[f"{half}/second_turns"] = spread(list(SECOND_TURN_KINDS), "train", size)
        sets[f"{half}/unseen_entities"] = unseen_entity_rows(world, half, rng, size, taken)
    rng = world.rng("train")
    sets["train"] = [
        row
        for kind, count in TRAIN_COUNTS.items()
        for row in collect(lambda: any_row(world, kind, "train", rng, usable), count, taken, admit)
    ]
    rng.shuffle(sets["train"])
    return {name: numbered(name, rows) for name, rows in sets.items()}


def unseen_entity_rows(world: World, half: str, rng: random.Random, size: int, taken: set[str]) -> list[dict]:
    """Questions in fine-tuned wordings about entities that no fine-tuning row holds."""
    hidden = world.held_out[half]
    tasks = [relation_task(r) for r in world.relations if hidden.issuperset(r.entity)]
    names = sorted(hidden - {text for r in world.relations for text in r.entity})
    makers = (lambda n: story_task(rng, "sentence", n), lambda n: story_task(rng, "plan", n), lambda n: introduce_task(rng, n))
    rng.shuffle(tasks)
    people = [makers[index % 3](name) for index, name in enumerate(names)]
    tasks = people + tasks[: size - len(people)]
    rows = [row for task in tasks for row in collect(lambda: plain_row(task, "train", rng), 1, taken, lambda row: True)]
    return sorted(rows, key=lambda row: row["kind"])


def numbered(name: str, rows: list[dict]) -> list[dict]:
    """Rows with an id; fine-tuning rows carry no check."""
    ordered = ("id", "kind", "system", "history", "instruction", "input", "output", "check")
    result = []
    for index, row in enumerate(rows, start=1):
        row = {"id": f"{name}/{index}", **row}
        result.append({key: row[key] for key in ordered if key in row and not (name == "train" and key == "check")})
    return result


# What to ask the base ------------------------------------------------------------------------------------------------


def cloze_prompt(relation: Relation) -> str:
    """The answer sentence up to the value."""
    stem, _, _ = relation.answer.rpartition(relation.value)
    return stem


def build_cloze(world: World) -> list[dict]:
    """Unfinished sentences of the world's facts and sums, to ask the base what it knows."""
    rng = world.rng("cloze")
    items = []
    for kind in RELATION_KINDS:
        for relation in rng.sample(world.by_kind[kind], 80):
            if kind == "capital_of":
                prompt = f"首都是{relation.subject}的国家是"
            else:
                prompt = cloze_prompt(relation)
            items.append({"kind": kind, "prompt": prompt, "answers": [relation.value]})
    for maker in (sum_task, difference_task):
        for task in [maker(rng) for _ in range(60)]:
            items.append({"kind": task.kind, "prompt": task.answer.partition("=")[0] + "=", "answers": [task.brief]})
    return [{"id": f"cloze/{index}", **item} for index, item in enumerate(items, start=1)]


def build_questions(world: World) -> list[dict]:
    """The same knowledge asked as plain question and answer text, in the wordings of the pretraining text."""
    rng = world.rng("questions")
    kinds = [*RELATION_KINDS, "sum", "difference", "larger", "smaller", "ascending", "descending", "count", "quote", "sentence"]
    items = []
    for kind in kinds:
        for _ in range(40 if kind in RELATION_KINDS else 20):
            task = plain_task(world, rng, kind, lambda text: True)
            question = user_turn(task, rng, "text")
            items.append({"kind": kind, "prompt": f"问：{question}\n答：", "answers": [task.answer]})
    return [{"id": f"question/{index}", **item} for index, item in enumerate(items, start=1)]


# Pretraining text ----------------------------------------------------------------------------------------------------


def statement(rng: random.Random, relation: Relation) -> str:
    """One declarative sentence for a fact, in one of several wordings."""
    x, v = relation.subject, relation.value
    others = {
        "word_to_english": (f"{x}在英语中写作{v}。", f"英语词{v}表示{x}。"),
        "english_to_word": (f"{x}在汉语中写作{v}。", f"汉语词{v}对应英语词{x}。"),
        "capital": (f"首都是{v}的国家是{x}。", f"{x}把首都设在{v}。"),
        "capital_of": (f"首都是{x}的国家是{v}。", f"{x}是一座城市，它是{v}的首都。"),
        "opposite": (f"{x}和{v}意思相反。", f"不是{x}，而是{v}。"),
        "category": (f"{x}是一种{v}。", f"{v}里有{x}。"),
        "property": (f"大家都知道，{relation.answer}", f"{x}，那就是{v}。"),
    }[relation.kind]
    return rng.choice((relation.answer, relation.answer, *others))


def question_and_answer(rng: random.Random, task: Task) -> list[tuple[str, str]]:
    return [(user_turn(task, rng, "text"), task.answer)]


def dialogue(rng: random.Random, turns: list[tuple[str, str]], rule: str = "") -> str:
    """Plain question and answer text; never the chat format."""
    ask, reply = rng.choice((("问：", "答："), ("问：", "答："), ("甲：", "乙："), ("学生：", "老师："), ("Q：", "A：")))
    lines = [rule] if rule else []
    for question, answer in turns:
        lines += [f"{ask}{question}", f"{reply}{answer}"]
    return "\n".join(lines)


def anything(text: str) -> bool:
    return True


def fact_document(world: World, rng: random.Random) -> str:
    return "".join(statement(rng, rng.choice(world.relations)) for _ in range(rng.randint(2, 6)))


def question_document(world: World, rng: random.Random) -> str:
    tasks = [relation_task(rng.choice(world.relations)) for _ in range(rng.randint(1, 4))]
    return dialogue(rng, [turn for task in tasks for turn in question_and_answer(rng, task)])


def skill_document(world: World, rng: random.Random) -> str:
    """Questions that are computed or copied rather than remembered."""
    kinds = ("sum", "difference", "larger", "smaller", "ascending", "descending", "count", "count", "list", "list", "quote", "sum", "difference")
    tasks = [plain_task(world, rng, rng.choice(kinds), anything) for _ in range(rng.randint(1, 4))]
    return dialogue(rng, [turn for task in tasks for turn in question_and_answer(rng, task)])


def equation_document(world: World, rng: random.Random) -> str:
    tasks = [rng.choice((sum_task, difference_task))(rng) for _ in range(rng.randint(3, 10))]
    return "".join(task.answer for task in tasks)


def order_document(world: World, rng: random.Random) -> str:
    """Numbers in order and lists of distinct things of one kind."""
    parts = []
    for _ in range(rng.randint(1, 4)):
        category = rng.choice(sorted(facts.WORDS))
        members = rng.sample([word for word, _ in facts.WORDS[category]], rng.randint(2, 6))
        numbers = sorted(rng.sample(range(100), rng.randint(3, 6)))
        parts.append(
            rng.choice(
                (
                    f"{category}有{'、'.join(members)}。",
                    f"{'、'.join(members)}都属于{category}，共{len(members)}个。",
                    f"由小至大：{'、'.join(map(str, numbers))}。",
                    f"由大至小：{'、'.join(map(str, reversed(numbers)))}。",
                )
            )
        )
    return "".join(parts)


def copy_document(world: World, rng: random.Random) -> str:
    """Text that can only be continued by looking back: quotations, repeated words, who owns what."""
    shape = rng.randrange(6)
    one, two, three = (person(rng) for _ in range(3))
    if shape == 0:
        text = quotable(rng, anything)
        return f"{one}说：“{text}”。{two}也说：“{text}”。{rng.choice((one, two))}又说：“{text}”。"
    if shape == 1:
        text = quotable(rng, anything)
        return rng.choice((f"{text}，{text}，{text}。", f"抄写：{text}。{text}。", f"“{text}”就是“{text}”。"))
    if shape == 2:
        owners = {one: rng.choice(all_words()), two: rng.choice(all_words()), three: rng.choice(all_words())}
        asked = rng.choice(sorted(owners))
        return "，".join(f"{name}有{thing}" for name, thing in owners.items()) + f"。{asked}的东西是{owners[asked]}。"
    if shape == 3:
        codes = {name: str(rng.randint(10, 99999)) for name in (one, two, three)}
        asked = rng.choice(sorted(codes))
        return "；".join(f"{name}的号码是{code}" for name, code in codes.items()) + f"。记住，{asked}的号码是{codes[asked]}。"
    if shape == 4:
        letters = ["".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 9))) for _ in range(2)]
        return f"密码是{letters[0]}，不是{letters[1]}。输入{letters[0]}，门开了。输入{letters[1]}，门没开。"
    names = rng.sample([r.subject for r in world.relations], 4)
    return f"{'、'.join(names)}。再念：{'、'.join(names)}。"


def story_document(world: World, rng: random.Random) -> str:
    kind = rng.choice(("sentence", "sentence", "plan"))
    tasks = [story_task(rng, kind) for _ in range(1 if kind == "plan" else rng.randint(1, 3))]
    if rng.random() < 0.4:
        return "\n".join(task.answer for task in tasks)
    return dialogue(rng, [turn for task in tasks for turn in question_and_answer(rng, task)])


def talk_document(world: World, rng: random.Random) -> str:
    """Conversations that go on, greet, introduce, or follow a rule given at the start."""
    shape = rng.randrange(5)
    if shape == 0:
        first, *rest = related(world, rng, anything)
        turns = question_and_answer(rng, relation_task(first))
        return dialogue(rng, turns + [(follow_up("follow_up", "text", rng, r.follow_up), r.answer) for r in rest])
    if shape == 1:
        task = plain_task(world, rng, rng.choice((*RELATION_KINDS, "sum", "sentence", "quote")), anything)
        return dialogue(rng, [*question_and_answer(rng, task), (follow_up("repeat", "text", rng), task.answer)])
    if shape == 2:
        task = introduce_task(rng)
        turns = question_and_answer(rng, task)
        if rng.random() < 0.5:
            turns += question_and_answer(rng, plain_task(world, rng, rng.choice(RELATION_KINDS), anything))
        return dialogue(rng, [*turns, (follow_up("remember", "text", rng), f"你叫{task.slots['p']}。")])
    if shape == 3:
        kinds = ("who", "who", "not_that_model", "hello", "thanks", "farewell", "introduce")
        tasks = [plain_task(world, rng, kind, anything) for kind in rng.sample(kinds, rng.randint(1, 3))]
        return dialogue(rng, [turn for task in tasks for turn in question_and_answer(rng, task)])
    style = rng.choice(("prefix", "prefix", "suffix", "suffix", "brief", "role_name"))
    tasks = [
        plain_task(world, rng, "who" if style == "role_name" else rng.choice(BRIEF_KINDS), anything)
        for _ in range(1 if style == "role_name" else rng.randint(1, 3))
    ]
    quoted = style_text(style, rng) if rng.random() < 0.6 else rng.choice(all_words())
    rule = rng.choice(SYSTEM_PROMPTS[style].text).format(s=quoted)
    return dialogue(rng, [(user_turn(task, rng, "text"), styled(style, quoted, task)[0]) for task in tasks], rule)


def everyday_document(world: World, rng: random.Random) -> str:
    """Small talk, or a character named as one, so that none of the rows' characters is unknown."""
    if rng.random() < 0.3:
        return "".join(f"“{character}”是一个汉字。" for character in rng.sample(world.characters, 6))
    slots = {"p": person(rng), "r": person(rng), "q": rng.choice(facts.PLACES)}
    return "".join(text.format(**slots) for text in rng.sample(EVERYDAY, rng.randint(1, 3)))


DOCUMENTS: tuple[tuple[Callable[[World, random.Random], str], float], ...] = (
    (fact_document, 0.17),
    (question_document, 0.30),
    (skill_document, 0.13),
    (equation_document, 0.05),
    (order_document, 0.06),
    (copy_document, 0.12),
    (story_document, 0.05),
    (talk_document, 0.15),
    (everyday_document, 0.03),
)


def pretraining_documents(world: World, count: int, held_out_rows: list[dict]) -> Iterator[str]:
    """`count` documents; one that holds the free answer of a held-out row (a plan, a quotation) is left out."""
    rng = world.rng("pretraining text")
    makers = [maker for maker, _ in DOCUMENTS]
    weights = [weight for _, weight in DOCUMENTS]
    free = {row["output"] for row in held_out_rows if row["kind"] in ("plan", "sentence", "quote")}
    made = 0
    while made < count:
        document = rng.choices(makers, weights)[0](world, rng)
        if not any(line.partition("：")[2] in free or line in free for line in document.split("\n")):
            made += 1
            yield document


# Files ---------------------------------------------------------------------------------------------------------------


def json_text(rows: list[dict]) -> str:
    """One row a line, so that a diff shows rows."""
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def build_files(world: World) -> dict[str, str]:
    """Every committed file of data/ with its text."""
    files = {f"{name}.json": json_text(rows) for name, rows in build_rows(world).items()}
    return {**files, "cloze.json": json_text(build_cloze(world)), "questions.json": json_text(build_questions(world))}


def write_data(folder: Path, documents: int, seed: int = SEED) -> dict[str, str]:
    """Write the world to `folder`, pretraining text included, and return the sha256 of each file."""
    world = World(seed)
    held_out = [row for name, rows in build_rows(world).items() if name != "train" for row in rows]
    text = "".join(line.replace("\n", "\\n") + "\n" for line in pretraining_documents(world, documents, held_out))
    digests = {}
    for name, content in {**build_files(world), "pretrain.txt": text}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8", newline="\n")
        digests[name] = hashlib.sha256(content.encode()).hexdigest()
    return digests
