"""Shape and uniqueness of the fact tables: every relation asked about must be a function."""

import re
from pathlib import Path

import pytest

from nano import facts

CHINESE = re.compile(r"[\u4e00-\u9fff]+")


def repeated(items):
    items = list(items)
    return sorted({item for item in items if items.count(item) > 1})


def all_words():
    return [pair for pairs in facts.WORDS.values() for pair in pairs] + facts.OTHER_WORDS


def test_words_translate_one_to_one():
    assert repeated(chinese for chinese, _ in all_words()) == []
    assert repeated(english for _, english in all_words()) == []


def test_words_have_the_stated_form():
    for chinese, english in all_words():
        assert CHINESE.fullmatch(chinese), chinese
        assert re.fullmatch(r"[A-Za-z][a-z]{1,11}", english), english
    assert sum(len(chinese) == 1 for chinese, _ in all_words()) < 60


def test_words_are_many():
    assert sum(map(len, facts.WORDS.values())) >= 680
    assert len(facts.OTHER_WORDS) >= 150
    for category, pairs in facts.WORDS.items():
        assert 10 <= len(pairs) <= 60, category


def test_countries_and_capitals_are_one_to_one():
    assert len(facts.COUNTRIES) == 194
    assert repeated(country for country, _ in facts.COUNTRIES) == []
    assert repeated(capital for _, capital in facts.COUNTRIES) == []


def test_contested_countries_are_in_the_table():
    assert set(facts.CONTESTED_CAPITALS) <= {country for country, _ in facts.COUNTRIES}


def test_opposites_use_every_word_once():
    assert len(facts.OPPOSITES) >= 170
    assert repeated(word for pair in facts.OPPOSITES for word in pair) == []
    assert sum(len(word) == 1 for word, _ in facts.OPPOSITES) <= 40
    assert all(CHINESE.fullmatch(word) for pair in facts.OPPOSITES for word in pair)


@pytest.mark.parametrize("attribute", sorted(facts.PROPERTIES))
def test_property_is_a_function_with_short_values(attribute):
    pairs = facts.PROPERTIES[attribute]
    assert repeated(entity for entity, _ in pairs) == []
    for entity, value in pairs:
        assert entity and not re.search(r"\s", entity)
        assert re.fullmatch(r"\S{1,8}", value), value


@pytest.mark.parametrize(
    "attribute, count",
    [("货币", 60), ("官方语言", 30), ("元素符号", 60), ("作者", 40), ("朝代", 40), ("省会", 22)],
)
def test_properties_reach_their_counts(attribute, count):
    assert len(facts.PROPERTIES[attribute]) >= count


def test_country_properties_name_known_countries():
    names = {country for country, _ in facts.COUNTRIES}
    for attribute in ("货币", "官方语言"):
        assert {entity for entity, _ in facts.PROPERTIES[attribute]} <= names


@pytest.mark.parametrize(
    "name, count",
    [("SURNAMES", 60), ("GIVEN_NAMES", 150), ("PLACES", 150), ("ACTIVITIES", 60), ("OBJECTS", 80)],
)
def test_story_tables_are_large_and_without_repeats(name, count):
    items = getattr(facts, name)
    assert len(items) >= count
    assert repeated(items) == []
    for item in items:
        assert CHINESE.fullmatch("".join(item)), item


def test_names_are_short_and_objects_have_a_measure_word():
    assert all(len(name) == 1 for name in facts.SURNAMES)
    assert all(1 <= len(name) <= 2 for name in facts.GIVEN_NAMES)
    assert all(len(measure) == 1 for measure, _ in facts.OBJECTS)
    assert repeated(noun for _, noun in facts.OBJECTS) == []


def test_places_are_neither_countries_nor_capitals():
    taken = {name for names in facts.COUNTRIES for name in names}
    assert taken.isdisjoint(facts.PLACES)


def test_few_distinct_characters():
    tables = (Path(facts.__file__).parent / "tables").glob("*.json")
    text = "".join(table.read_text(encoding="utf-8") for table in tables)
    assert len(set("".join(CHINESE.findall(text)))) < 2300
