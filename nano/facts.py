"""What is true in the small world, and the names of its stories: tables/ as Python values, without its wordings.

Sentences, questions and splits are made from them elsewhere. All Chinese is simplified.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_table(name: str) -> Any:
    """The content of tables/NAME.json."""
    return json.loads((Path(__file__).parent / "tables" / f"{name}.json").read_text(encoding="utf-8"))


WORDS: dict[str, list[list[str]]] = read_table("words")
"""Category -> [Chinese, English]. Together with OTHER_WORDS every Chinese and every English word occurs once, so that
translation is a function both ways."""

OTHER_WORDS: list[list[str]] = read_table("other_words")
"""Verbs, adjectives and abstract nouns as [Chinese, English]."""

COUNTRIES: list[list[str]] = read_table("countries")
"""[country, capital] of the 193 members of the United Nations and 梵蒂冈. Where a country has several capitals the one
commonly taught is given. 金斯顿 and 金斯敦 are two different cities."""

CONTESTED_CAPITALS = ("以色列", "瑙鲁", "赤道几内亚", "也门")
"""Countries whose capital is disputed, being moved or not official: better left out of questions."""

OPPOSITES: list[list[str]] = read_table("opposites")
"""[word, opposite]: every word occurs once in the whole table."""

PROPERTIES: dict[str, list[list[str]]] = read_table("properties")
"""Attribute -> [entity, value]. Inside one attribute every entity occurs once."""

SURNAMES: list[str] = read_table("surnames")
GIVEN_NAMES: list[str] = read_table("given_names")
"""Parts of names for invented people."""

PLACES: list[str] = read_table("places")
"""Chinese cities, towns and landmarks for stories; none is a country or a capital."""

OBJECTS: list[list[str]] = read_table("objects")
"""[measure word, noun] of things a person can buy or carry."""

ACTIVITIES: list[str] = read_table("activities")
"""Verb phrases that can follow 喜欢."""
