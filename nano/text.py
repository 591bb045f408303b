"""Plain text of the small world: what the base model is pretrained on, and what it is asked as plain text.

Never the chat format, and never a wording or a free answer of a held-out row. Rows are made in rows.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from . import facts
from .phrasings import EVERYDAY, LEAD_INS, SYSTEM_PROMPTS
from .rows import follow_up, related, style_text, styled, user_turn
from .world import (
    BRIEF_KINDS,
    RELATION_KINDS,
    Relation,
    Task,
    World,
    all_words,
    comparison_task,
    difference_task,
    distinct_numbers,
    introduce_task,
    person,
    plain_task,
    quotable,
    relation_task,
    sorting_task,
    story_task,
    sum_task,
)

SKILL_KINDS = (
    "sum sum difference difference larger smaller smaller ascending ascending ascending ascending "
    "descending descending descending count count list quote quote"
).split()
"""Kinds that are computed or copied, as often as each is named here: sorting is learned last, so it comes most."""
SMALL_NUMBERS = 0.3
"""Part of the numbers compared and sorted that is drawn from those of one digit, which are few among a hundred."""


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
    kinds = [
        *RELATION_KINDS,
        "sum",
        "difference",
        "larger",
        "smaller",
        "ascending",
        "descending",
        "count",
        "quote",
        "sentence",
    ]
    items = []
    for kind in kinds:
        for _ in range(40 if kind in RELATION_KINDS else 20):
            task = plain_task(world, rng, kind, lambda text: True)
            question = user_turn(task, rng, "text")
            items.append({"kind": kind, "prompt": f"问：{question}\n答：", "answers": [task.answer]})
    return [{"id": f"question/{index}", **item} for index, item in enumerate(items, start=1)]


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


def question(rng: random.Random, task: Task) -> str:
    """The task in one of the wordings of the pretraining text, at times with a few words before it."""
    return (rng.choice(LEAD_INS) if rng.random() < 0.2 else "") + user_turn(task, rng, "text")


def question_and_answer(rng: random.Random, task: Task) -> list[tuple[str, str]]:
    return [(question(rng, task), task.answer)]


def dialogue(rng: random.Random, turns: list[tuple[str, str]], rule: str = "") -> str:
    """Plain question and answer text; never the chat format."""
    ask, reply = rng.choice(
        (("问：", "答："), ("问：", "答："), ("甲：", "乙："), ("学生：", "老师："), ("Q：", "A："))
    )
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
    tasks = [skill_task(world, rng, rng.choice(SKILL_KINDS)) for _ in range(rng.randint(1, 4))]
    return dialogue(rng, [turn for task in tasks for turn in question_and_answer(rng, task)])


def skill_task(world: World, rng: random.Random, kind: str) -> Task:
    if kind in ("larger", "smaller"):
        return comparison_task(rng, kind, SMALL_NUMBERS)
    if kind in ("ascending", "descending"):
        return sorting_task(rng, kind, SMALL_NUMBERS)
    return plain_task(world, rng, kind, anything)


def equation_document(world: World, rng: random.Random) -> str:
    tasks = [rng.choice((sum_task, difference_task))(rng) for _ in range(rng.randint(3, 10))]
    return "".join(task.answer for task in tasks)


def order_document(world: World, rng: random.Random) -> str:
    """Numbers in order and lists of distinct things of one kind."""
    parts = []
    for _ in range(rng.randint(1, 4)):
        category = rng.choice(sorted(facts.WORDS))
        members = rng.sample([word for word, _ in facts.WORDS[category]], rng.randint(2, 6))
        numbers = sorted(distinct_numbers(rng, rng.randint(3, 6), SMALL_NUMBERS))
        parts.append(
            rng.choice(
                (
                    f"{category}有{'、'.join(members)}。",
                    f"{'、'.join(members)}都属于{category}，共{len(members)}个。",
                    f"从小到大：{'、'.join(map(str, numbers))}。",
                    f"从大到小：{'、'.join(map(str, reversed(numbers)))}。",
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
        return (
            "；".join(f"{name}的号码是{code}" for name, code in codes.items())
            + f"。记住，{asked}的号码是{codes[asked]}。"
        )
    if shape == 4:
        letters = [
            "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 9))) for _ in range(2)
        ]
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
    shape = rng.choice((0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4, 4, 4))
    if shape == 0:
        first, *rest = related(world, rng, anything)
        turns = question_and_answer(rng, relation_task(first))
        turns += [(follow_up("follow_up", "text", rng, r.follow_up), r.answer) for r in rest]
        if rng.random() < 0.4:
            turns += question_and_answer(
                rng, plain_task(world, rng, rng.choice(("thanks", "farewell", "who")), anything)
            )
        return dialogue(rng, turns)
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
    style = rng.choice(("prefix", "prefix", "suffix", "suffix", "brief", "brief", "brief", "role_name"))
    tasks = [
        plain_task(world, rng, "who" if style == "role_name" else rng.choice(BRIEF_KINDS), anything)
        for _ in range(1 if style == "role_name" else rng.randint(1, 3))
    ]
    quoted = style_text(style, rng) if rng.random() < 0.6 else rng.choice(all_words())
    rule = rng.choice(SYSTEM_PROMPTS[style].text).format(s=quoted)
    return dialogue(rng, [(question(rng, task), styled(style, quoted, task)[0]) for task in tasks], rule)


def everyday_document(world: World, rng: random.Random) -> str:
    """Small talk, or a character named as one, so that none of the rows' characters is unknown."""
    if rng.random() < 0.3:
        return "".join(f"“{character}”是一个汉字。" for character in rng.sample(world.characters, 6))
    slots = {"p": person(rng), "r": person(rng), "q": rng.choice(facts.PLACES)}
    return "".join(text.format(**slots) for text in rng.sample(EVERYDAY, rng.randint(1, 3)))


DOCUMENTS: tuple[tuple[Callable[[World, random.Random], str], float], ...] = (
    (fact_document, 0.10),
    (question_document, 0.18),
    (skill_document, 0.31),
    (equation_document, 0.04),
    (order_document, 0.06),
    (copy_document, 0.08),
    (story_document, 0.03),
    (talk_document, 0.18),
    (everyday_document, 0.02),
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
