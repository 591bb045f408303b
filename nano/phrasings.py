"""How the small world asks: every wording of every kind of task, in four groups that never mix.

`text` is for pretraining, `train` for fine-tuning, `dev` and `test` are held out. The wordings are in tables/; what is
asked about is in facts.py, and world.py puts the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

from .facts import read_table


@dataclass(frozen=True)
class Phrasings:
    """The wordings of one kind of task, by the only place each may be used in."""

    text: list[str]
    train: list[str]
    dev: list[str]
    test: list[str]


def read_phrasings(name: str) -> dict[str, Phrasings]:
    """The wordings of tables/NAME.json by kind."""
    return {kind: Phrasings(**groups) for kind, groups in read_table(name).items()}


PHRASINGS = read_phrasings("questions")
"""First questions of all kinds. " || " separates an Alpaca row's instruction from its input."""

FOLLOW_UPS = read_phrasings("follow_ups")
"""Later questions of a conversation: {y} is a new entity for the relation of the turn before."""

SYSTEM_PROMPTS = read_phrasings("system_prompts")
"""System prompts of one line. {s} is quoted text that the answer has to use."""

OPENINGS: list[str] = read_table("openings")
CLOSINGS: list[str] = read_table("closings")
"""What a system prompt may ask to be said before or after each answer."""

LEAD_INS = ("劳驾，", "请教一下，", "我问你，", "老师，", "那个，", "喂，", "快说，", "帮个忙，")
"""What may come before any question of the pretraining text."""

EVERYDAY: list[str] = read_table("everyday")
"""Small talk for pretraining, so that no everyday character is new to the base model. {p} and {r} are people, {q} a
place."""
