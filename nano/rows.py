"""Rows in Alpaca form: the fine-tuning set and the dev and test halves of the four held-out sets.

Questions come from world.py, wordings from phrasings.py; pretraining text is made elsewhere.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from .facts import read_table
from .phrasings import CLOSINGS, FOLLOW_UPS, OPENINGS, PHRASINGS, SYSTEM_PROMPTS
from .world import (
    BRIEF_KINDS,
    RELATION_KINDS,
    Relation,
    Task,
    World,
    introduce_task,
    plain_task,
    relation_task,
    story_task,
)

HELD_OUT_SETS = ("unseen_rows", "unseen_entities", "unseen_phrasings", "second_turns")
TRAIN_COUNTS: dict[str, int] = read_table("row_counts")
"""Rows of each kind in the fine-tuning set: more where the base has to be led further, such as rules and numbers."""
SECOND_TURN_KINDS = ("follow_up", "repeat", "remember", "new_topic")
FEW_ROWS = ("who", "hello", "thanks", "farewell")


def fill(wording: str, slots: dict[str, str]) -> tuple[str, str]:
    """Instruction and input of a wording with its slots filled."""
    instruction, _, context = wording.format(**slots).partition(" || ")
    return instruction, context


def as_turn(wording: str, slots: dict[str, str]) -> str:
    """The wording as one user turn: instruction, blank line, input."""
    return "\n\n".join(part for part in fill(wording, slots) if part)


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
    """Two or three facts of the same relation, for several turns of one conversation."""
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
    last = rng.choice((*RELATION_KINDS, "sum", "quote", "count", "thanks", "farewell", "who"))
    row = plain_row(plain_task(world, rng, last, usable), "train", rng)
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
    task = plain_task(world, rng, kind, usable)
    return plain_row(task, group, rng)


def row_key(row: dict) -> str:
    """What makes two rows the same: all that the model is shown."""
    return json.dumps(
        [row.get("system", ""), row.get("history", []), row["instruction"], row["input"]], ensure_ascii=False
    )


def row_text(row: dict) -> str:
    """All text of a row, for a search."""
    turns = [text for turn in row.get("history", []) for text in turn]
    return "\n".join([row.get("system", ""), *turns, row["instruction"], row["input"], row["output"]])


def collect(
    make: Callable[[], dict], count: int, taken: set[str], admit: Callable[[dict], bool], tries: int = 60
) -> list[dict]:
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
    makers = (
        lambda n: story_task(rng, "sentence", n),
        lambda n: story_task(rng, "plan", n),
        lambda n: introduce_task(rng, n),
    )
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
