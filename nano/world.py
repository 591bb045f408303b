"""The small world of glm4-nano: its facts as relations, who is held out, and single questions with their answers.

Everything comes from one seed and is the same byte for byte each time. What is true lives in facts.py and how it is
asked in phrasings.py; rows, pretraining text and files are made in rows.py, text.py and files.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from . import facts
from .phrasings import CLOSINGS, FOLLOW_UPS, OPENINGS, PHRASINGS, SYSTEM_PROMPTS

SEED = 20261124
IDENTITY = "我是glm4-nano，本课程的小模型。"
OTHER_MODELS = (
    "ChatGLM",
    "ChatGPT",
    "GPT-4",
    "Claude",
    "文心一言",
    "通义千问",
    "豆包",
    "Kimi",
    "GLM-4",
    "Gemini",
    "Llama",
)
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
LIST_COUNTS = (2, 3, 4)


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
        tables = (PHRASINGS, FOLLOW_UPS, SYSTEM_PROMPTS)
        wordings = [w for table in tables for group in table.values() for w in (*group.train, *group.dev, *group.test)]
        names = (*facts.PLACES, *facts.ACTIVITIES, *facts.GIVEN_NAMES)
        texts = [*wordings, *(relation.answer for relation in self.relations), *names]
        return sorted({character for text in texts for character in text if "\u4e00" <= character <= "\u9fff"})

    @cached_property
    def by_kind(self) -> dict[str, list[Relation]]:
        return {kind: [r for r in self.relations if r.kind == kind] for kind in RELATION_KINDS}


def all_relations() -> Iterator[Relation]:
    """Every fact of facts.py as a question and an answer."""
    categorised = [(word, english, category) for category, words in facts.WORDS.items() for word, english in words]
    for word, english in [*((w, e) for w, e, _ in categorised), *facts.OTHER_WORDS]:
        yield Relation("word_to_english", word, english, f"{word}的英文是{english}。", (word, english), word)
        yield Relation("english_to_word", english, word, f"{english}的中文是{word}。", (word, english), english)
    for word, english, category in categorised:
        yield Relation("category", word, category, f"{word}属于{category}。", (word, english), word)
    for country, capital in facts.COUNTRIES:
        if country == capital or country in facts.CONTESTED_CAPITALS:
            continue
        yield Relation("capital", country, capital, f"{country}的首都是{capital}。", (country, capital), country)
        if capital not in SHARED_CAPITAL_NAMES:
            yield Relation("capital_of", capital, country, f"{capital}是{country}的首都。", (country, capital), capital)
    for one, other in facts.OPPOSITES:
        for word, opposite in ((one, other), (other, one)):
            yield Relation("opposite", word, opposite, f"{word}的反义词是{opposite}。", (one, other), word)
    for attribute, pairs in facts.PROPERTIES.items():
        for entity, value in pairs:
            asked = f"{entity}的{attribute}"
            yield Relation("property", asked, value, f"{asked}是{value}。", (entity,), entity, attribute)


def choose_held_out(world: World) -> dict[str, frozenset[str]]:
    """Entities for `unseen_entities`: none of their strings is part of another string of the world."""
    wordings = "\n".join(
        text
        for table in (PHRASINGS, FOLLOW_UPS, SYSTEM_PROMPTS)
        for wording in table.values()
        for text in (*wording.train, *FIXED_ANSWERS.values(), *OPENINGS, *CLOSINGS)
    )
    strings = {text for relation in world.relations for text in (*relation.entity, relation.value)}
    strings |= {*facts.ACTIVITIES, *facts.PLACES, *facts.WORDS, *(noun for _, noun in facts.OBJECTS)}
    everything = "\n".join(sorted(strings)) + "\n" + wordings
    listed = {word for category in facts.WORDS for word in first_members(category, max(LIST_COUNTS))}
    chosen: dict[str, set[str]] = {"dev": set(), "test": set()}
    rng = world.rng("held-out entities")
    for kind, halves in (
        ("category", 55),
        ("capital", 22),
        ("opposite", 18),
        ("property", 24),
        ("word_to_english", 12),
    ):
        entities = sorted({relation.entity for relation in world.by_kind[kind]})
        free = [
            entity
            for entity in entities
            if all(everything.count(text) == 1 for text in entity) and not listed & {*entity}
        ]
        free = [
            entity for entity in free if not chosen["dev"].intersection(entity) | chosen["test"].intersection(entity)
        ]
        picked = rng.sample(free, min(2 * halves, len(free) // 3 * 2))
        for half, part in (("dev", picked[::2]), ("test", picked[1::2])):
            chosen[half].update(text for entity in part for text in entity)
    for half, count in (("dev", 12), ("test", 24)):
        chosen[half].update(person(rng) for _ in range(count))
    return {half: frozenset(texts) for half, texts in chosen.items()}


def person(rng: random.Random) -> str:
    """An invented full name."""
    return rng.choice(facts.SURNAMES) + rng.choice(facts.GIVEN_NAMES)


def relation_task(relation: Relation) -> Task:
    return Task(relation.kind, {"x": relation.subject}, relation.answer, relation.value)


def first_members(category: str, count: int) -> list[str]:
    """The members of a category that every list names: one habit to learn, not a new choice each time."""
    return [word for word, _ in facts.WORDS[category][:count]]


def list_task(rng: random.Random) -> Task:
    category = rng.choice(sorted(facts.WORDS))
    members = [word for word, _ in facts.WORDS[category]]
    count = rng.choice(LIST_COUNTS)
    picked = first_members(category, count)
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


def distinct_numbers(rng: random.Random, count: int, small: float) -> list[int]:
    """Numbers below 100; `small` is the part that is drawn from those of one digit."""
    numbers: list[int] = []
    while len(numbers) < count:
        number = rng.randrange(10 if rng.random() < small else 100)
        if number not in numbers:
            numbers.append(number)
    return numbers


def comparison_task(rng: random.Random, kind: str, small: float = 0.0) -> Task:
    a, b = distinct_numbers(rng, 2, small)
    first, second = (max(a, b), min(a, b)) if kind == "larger" else (min(a, b), max(a, b))
    word = "大" if kind == "larger" else "小"
    return Task(kind, {"a": str(a), "b": str(b)}, f"{first}比{second}{word}。")


def sorting_task(rng: random.Random, kind: str, small: float = 0.0) -> Task:
    numbers = distinct_numbers(rng, rng.choice((3, 3, 4)), small)
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
        "list": lambda: list_task(rng),
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
