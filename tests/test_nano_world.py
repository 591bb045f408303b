"""The small world: splits that do not leak, rows that regenerate byte for byte, checks that fit their answers."""

import hashlib
import itertools
import json
import re
import unicodedata
from pathlib import Path

import pytest

import glm4_helpers
from glm4_helpers.evaluation import check_answer
from nano import files, phrasings, rows, world
from nano.__main__ import main as nano_main
from nano.text import pretraining_documents

DATA = Path(__file__).parents[1] / "data"
HELD_OUT = [f"{half}/{name}" for half in ("dev", "test") for name in rows.HELD_OUT_SETS]


def read(name: str) -> list[dict]:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def the_world():
    return world.World()


@pytest.fixture(scope="module")
def train():
    return read("train")


@pytest.fixture(scope="module")
def documents(the_world):
    """A million characters of the pretraining text, from its beginning."""
    held_out = [row for name in HELD_OUT for row in read(name)]
    return list(pretraining_documents(the_world, 20_000, held_out))


def bare(turn: str) -> str:
    """Text without punctuation and spaces (but with minus signs and slots): texts that differ by these are equal."""
    kept = (c for c in unicodedata.normalize("NFKC", turn) if c in "-{}" or unicodedata.category(c)[0] not in "PZC")
    return "".join(kept).replace("|", "")


def user_turn(row: dict) -> str:
    return "\n\n".join(part for part in (row["instruction"], row["input"]) if part)


def test_committed_rows_regenerate_byte_for_byte(the_world):
    for name, content in files.build_files(the_world, rows.build_rows(the_world)).items():
        assert (DATA / name).read_bytes() == content.encode(), name


@pytest.mark.slow
def test_the_data_command_writes_the_files_that_the_card_lists(tmp_path, capsys):
    """All of data/ with the text glm4-nano was pretrained on, to the byte: about 20 seconds."""
    assert nano_main(["data", "--output", str(tmp_path), "--json"]) == 0
    digests = json.loads(capsys.readouterr().out)
    assert {"train.json", "cloze.json", "pretrain.txt"} <= set(digests)
    assert (tmp_path / "README.md").read_bytes() == (DATA / "README.md").read_bytes()
    assert digests["pretrain.txt"] in (DATA.parent / "weights/glm4-nano/README.md").read_text(encoding="utf-8")
    for name, digest in digests.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest


def test_fewer_documents_are_written_and_said(tmp_path, capsys):
    assert nano_main(["data", "--output", str(tmp_path), "--documents", "20"]) == 0
    assert f"Written to {tmp_path}" in capsys.readouterr().out
    assert len((tmp_path / "pretrain.txt").read_text(encoding="utf-8").splitlines()) == 20


def test_help_and_errors_of_nano_are_those_of_the_course(capsys):
    for arguments, status, said in (
        (["--help"], 0, "python -m nano pretrain"),
        (["data", "--help"], 0, "--documents"),
        (["pretrain", "--help"], 0, "--epochs"),
        (["dta"], 2, "Did you mean data?"),
        (["data", "--documents", "0"], 2, "Fix: See python -m nano data --help."),
    ):
        with pytest.raises(SystemExit) as stopped:
            nano_main(arguments)
        printed = capsys.readouterr()
        assert stopped.value.code == status and said in printed.out + printed.err


def test_data_written_into_what_is_a_file_leaves_the_file(tmp_path, capsys):
    file = tmp_path / "results"
    file.write_text("mine")
    assert nano_main(["data", "--documents", "20", "--output", str(file)]) == 2
    assert "results" in (said := capsys.readouterr().err) and "Not a directory" in said
    assert file.read_text() == "mine"


def test_pretraining_without_its_text_names_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GLM4_HOME", str(tmp_path))
    assert nano_main(["pretrain"]) == 2
    assert "pretrain.txt is not there.\nFix: Make it: python -m nano data" in capsys.readouterr().err


def test_the_package_never_needs_nano():
    """nano is not installed: it may import the package, never the other way round."""
    package = Path(glm4_helpers.__file__).parent
    assert not [
        f.name for f in package.rglob("*.py") if re.search(r"^\s*(from|import) nano\b", f.read_text("utf-8"), re.M)
    ]


def test_another_seed_gives_other_rows():
    assert rows.build_rows(world.World(7))["train"] != read("train")


def test_sizes(train):
    assert 3000 <= len(train) <= 6000
    for name in rows.HELD_OUT_SETS:
        assert len(read(f"test/{name}")) >= 200
        assert len(read(f"dev/{name}")) >= 100
    kinds = {row["kind"] for row in train}
    assert kinds == set(rows.TRAIN_COUNTS)
    assert any("history" in row for row in train) and any("system" in row for row in train)
    assert not any("check" in row for row in train)


def test_no_row_stands_in_two_sets(train):
    everything = train + [row for name in HELD_OUT for row in read(name)]
    keys = [rows.row_key(row) for row in everything]
    assert len(keys) == len(set(keys))


def test_unseen_entities_stand_in_no_fine_tuning_row_not_even_as_a_part(the_world, train):
    hidden = the_world.held_out["dev"] | the_world.held_out["test"]
    assert len(hidden) > 150
    texts = "\n".join(rows.row_text(row) for row in train)
    assert [entity for entity in sorted(hidden) if entity in texts] == []


def test_every_unseen_entity_row_asks_about_a_held_out_entity_of_its_own_half(the_world):
    assert not the_world.held_out["dev"] & the_world.held_out["test"]
    for half in ("dev", "test"):
        for row in read(f"{half}/unseen_entities"):
            assert any(entity in rows.row_text(row) for entity in the_world.held_out[half]), row["id"]


def test_phrasings_never_mix():
    for table in (phrasings.PHRASINGS, phrasings.FOLLOW_UPS, phrasings.SYSTEM_PROMPTS):
        for kind, wordings in table.items():
            groups = [{bare(text) for text in getattr(wordings, group)} for group in ("text", "train", "dev", "test")]
            for one, other in itertools.combinations(groups, 2):
                assert not one & other, (kind, one & other)


def patterns(wordings) -> list[re.Pattern]:
    """Wordings as patterns over whole user turns, anything standing in their slots."""
    parts = [re.split(r"\{\w\}", bare(text)) for text in wordings]
    return [re.compile(".+?".join(map(re.escape, part))) for part in parts]


@pytest.mark.parametrize("half", ["dev", "test"])
def test_held_out_phrasings_occur_in_no_fine_tuning_row_of_their_kind(train, half):
    for kind, wordings in phrasings.PHRASINGS.items():
        held_out = patterns(getattr(wordings, half))
        turns = [bare(user_turn(row)) for row in train if row["kind"] == kind]
        assert [turn for turn in turns if any(pattern.fullmatch(turn) for pattern in held_out)] == []


@pytest.mark.parametrize("half", ["dev", "test"])
def test_no_held_out_wording_in_pretraining_text(documents, half):
    questions = {bare(line.partition("：")[2]) for document in documents for line in document.split("\n")}
    tables = (phrasings.PHRASINGS, phrasings.FOLLOW_UPS)
    held_out = patterns(text for table in tables for wordings in table.values() for text in getattr(wordings, half))
    assert [turn for turn in questions if any(pattern.fullmatch(turn) for pattern in held_out)] == []


def test_no_held_out_question_in_pretraining_text(documents):
    everything = "\n".join(documents)
    asked = [
        user_turn(row) for name in HELD_OUT for row in read(name) if row["kind"] not in ("hello", "thanks", "farewell")
    ]
    answers = world.FIXED_ANSWERS.values()  # who says 再见！ is told 再见！, and answers do stand in the text
    assert [turn for turn in asked if turn in everything and turn not in answers] == []


def test_no_role_token_in_pretraining_text(documents):
    assert not any("<|" in document or "[gMASK]" in document for document in documents)


def test_seven_in_ten_documents_are_dialogues_as_the_cards_say(documents):
    answered = [text for text in documents if re.search(r"^(答|乙|老师|A)：", text, re.MULTILINE)]
    assert 0.65 <= len(answered) / len(documents) < 0.75
    for card in ("README.md", "data/README.md", "weights/glm4-nano/README.md"):
        assert re.search("seven\\s(documents\\s)?in\\sten", (DATA.parent / card).read_text(encoding="utf-8")), card


def test_held_out_plans_and_quotations_are_not_in_pretraining_text(documents):
    everything = "\n".join(documents)
    free = [row["output"] for name in HELD_OUT for row in read(name) if row["kind"] in ("plan", "sentence")]
    assert free and [answer for answer in free if answer in everything] == []


def test_every_reference_answer_passes_its_own_check():
    for name in HELD_OUT:
        for row in read(name):
            assert check_answer(row["check"], row["output"]), row["id"]
            assert not check_answer(row["check"], row["output"] + "还有"), row["id"]


def test_second_turns_have_a_history_and_plans_are_long():
    assert all(row["history"] for half in ("dev", "test") for row in read(f"{half}/second_turns"))
    plans = [row for name in HELD_OUT for row in read(name) if row["kind"] == "plan"]
    assert plans and all(60 <= len(row["output"]) <= 150 for row in plans)


def test_facts_of_cloze_and_questions_are_asked_in_every_relation():
    for name in ("cloze", "questions"):
        kinds = {item["kind"] for item in read(name)}
        assert kinds >= set(world.RELATION_KINDS)
        assert all(item["answers"] and item["prompt"] for item in read(name))


def test_sums_and_orders_are_true(train):
    for row in train:
        if row["kind"] in ("sum", "difference"):
            left, _, right = row["output"].rstrip("。").partition("=")
            a, sign, b = re.fullmatch(r"(\d+)([+-])(\d+)", left).groups()
            assert int(right) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        if row["kind"] in ("ascending", "descending"):
            numbers = [int(n) for n in row["output"].rstrip("。").split("、")]
            assert numbers == sorted(numbers, reverse=row["kind"] == "descending")
