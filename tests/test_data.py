"""Data sets: every format to messages, what is wrong said with file and row, and nothing cut in silence."""

import json
import logging
import sys
from unittest.mock import create_autospec

import pytest

from glm4_helpers import data
from glm4_helpers.chat_format import IGNORE, encode
from glm4_helpers.rows import files, report
from glm4_helpers.support.errors import DataError, MachineError, SettingError

ALPACA = {"instruction": "翻译成英文。", "input": "苹果", "output": "apple"}
MESSAGES = [{"role": "user", "content": "翻译成英文。\n\n苹果"}, {"role": "assistant", "content": "apple"}]
SHAREGPT = {"conversations": [{"from": "human", "value": MESSAGES[0]["content"]}, {"from": "gpt", "value": "apple"}]}


@pytest.fixture
def write(tmp_path):
    """Writes rows (or text) to a file and returns its path."""

    def write_file(content, name="rows.json"):
        path = tmp_path / name
        if not isinstance(content, str):
            lines = [json.dumps(row, ensure_ascii=False) for row in content]
            content = "\n".join(lines) if name.endswith("jsonl") else json.dumps(content, ensure_ascii=False)
        path.write_text(content, encoding="utf-8")
        return path

    return write_file


def rows_of(*pairs):
    return [{"instruction": question, "input": "", "output": answer} for question, answer in pairs]


def many(count):
    return rows_of(*((f"问题{number}", f"答案{number}") for number in range(count)))


@pytest.mark.parametrize("row", [ALPACA, SHAREGPT, {"messages": MESSAGES}], ids=["alpaca", "sharegpt", "messages"])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_every_format_becomes_the_same_messages(write, row, name):
    path = write([row, row], name)
    assert data.read_rows(path) == [row, row]
    dataset = data.load_messages(path)
    assert dataset.column_names == ["messages"] and list(dataset["messages"]) == [MESSAGES, MESSAGES]


def test_alpaca_with_system_and_history():
    row = {**ALPACA, "system": "你是翻译。", "history": [["你好", "你好！"], ["再见", "再见！"]]}
    messages = data.to_messages(row)
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 3]
    assert [message["content"] for message in messages[:3]] == ["你是翻译。", "你好", "你好！"]
    assert messages[-2:] == MESSAGES


@pytest.mark.parametrize(
    ("instruction", "extra", "question"),
    [("问", "", "问"), ("问", None, "问"), ("", "入", "入"), (" 问", "入 ", " 问\n\n入 ")],
)
def test_instruction_and_input_are_joined_by_a_blank_line(instruction, extra, question):
    row = {"instruction": instruction, "input": extra, "output": "答"}
    assert data.to_messages(row)[0]["content"] == question


def test_sharegpt_roles_and_system_column():
    turns = [{"from": sender, "value": sender} for sender in ("user", "assistant", "tool")]
    roles = [message["role"] for message in data.to_messages({"system": "规则", "conversations": turns})]
    assert roles == ["system", "user", "assistant", "observation"]


def test_messages_with_tools_fit_a_table_and_render_the_same(write, nano_tokenizer):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"a": 1}}}]
    other = [{"type": "function", "function": {"name": "sum", "parameters": {"b": ["x"]}}}]
    rows = [{"messages": [{"role": "system", "content": "", "tools": each}, *MESSAGES]} for each in (tools, other)]
    dataset = data.load_messages(write(rows))
    for row, messages in zip(rows, dataset["messages"]):
        assert encode(nano_tokenizer, messages) == encode(nano_tokenizer, row["messages"])


def test_system_prompt_and_tools_beside_the_conversation_are_taken(write):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    told = [{"role": "system", "content": "", "tools": tools}, *MESSAGES]
    expected = data.load_messages(write([{"messages": told}], "told.json"))["messages"][0]
    for row in ({"messages": MESSAGES, "tools": tools}, {**SHAREGPT, "tools": json.dumps(tools)}):
        assert data.load_messages(write([row]))["messages"][0] == expected
    row = {"messages": [{"role": "system", "content": "简短。"}, *MESSAGES], "tools": tools}
    assert data.to_messages(row)[0] == {"role": "system", "content": "简短。", "tools": json.dumps(tools)}
    assert data.to_messages({"messages": MESSAGES, "system": "简短。"})[0] == {"role": "system", "content": "简短。"}


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"messages": [{"role": "system", "content": "a"}, *MESSAGES], "system": "b"}, "one beside them"),
        ({"messages": MESSAGES, "tools": "{"}, "'tools' is not JSON"),
        ({"messages": MESSAGES, "tools": {"name": "add"}}, "'tools' is an object"),
        ({**ALPACA, "output": "\ud83d"}, "half a character"),
        ({**ALPACA, "history": [["a", "\ud83d"]]}, "half a character"),
        ({**ALPACA, "tools": [{"name": "add", "description": "\ud83d"}]}, "the tools of a message .* half a character"),
        (
            {"messages": [MESSAGES[0], {"role": "tool_call", "content": '{"name": "\\ud83d"}'}]},
            "the metadata of .* half",
        ),
    ],
)
def test_what_would_be_lost_or_taught_wrongly_is_refused(write, row, word):
    with pytest.raises(DataError, match=f"rows.json, row 2.*{word}"):
        data.load_messages(write(json.dumps([_sound(row), row])))


def _sound(row):
    return {"messages": MESSAGES} if "messages" in row else ALPACA


def test_own_columns_are_kept(write):
    check = {"type": "exact", "answers": ["apple"]}
    dataset = data.load_messages(write([{**ALPACA, "id": "w-1", "kind": "word", "check": check, "else": 1}]))
    assert dataset.column_names == ["messages", "id", "kind", "check"]
    assert dataset[0]["check"] == check and dataset[0]["id"] == "w-1"


def test_a_folder_is_read_in_the_order_of_names(write, tmp_path):
    write(rows_of(("b", "2")), "b.json"), write(rows_of(("a", "1")), "a.jsonl"), write("no data", "README.md")
    assert [row["instruction"] for row in data.read_rows(tmp_path)] == ["a", "b"]


def test_jsonl_keeps_blank_lines_and_line_separators_apart(write):
    path = write('{"instruction": "a\u2028b", "output": "1"}\n\n{"instruction": "c", "output": 2}\n', "rows.jsonl")
    assert data.read_rows(path)[0]["instruction"] == "a\u2028b"
    with pytest.raises(DataError, match=r"row 2 \(line 3\).*'output' is a number"):
        data.load_messages(path)


def test_a_path_counts_from_the_course_folder_too(write, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write([ALPACA], "data/train.json")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("GLM4_HOME", str(tmp_path))
    assert data.read_rows("data/train.json") == [ALPACA]


BAD_FILES = {
    "empty": ("", "is empty"),
    "blank": (" \n", "is empty"),
    "no rows": ("[]", "holds no rows"),
    "not JSON": ('[{"instruction": "a",]', "is not JSON: .* line 1, column"),
    "rows below a key": (
        '{"data": [\n{"instruction": "a"}\n]}',
        "holds an object with a list in 'data' instead of a list of",
    ),
    "columns": (
        '{"instruction": {"0": "a"}, \n"output": {"0": "b"}}',
        "holds an object of columns, as pandas writes it",
    ),
    "row not an object": ('["a"]', "row 1: it is text instead of an object"),
    "no known column": ([{"title": "a"}], r"row 1: the row has the columns of no known format \(its columns: title\)"),
    "no answer column": ([{"question": "a"}], "row 1: the column 'answer' is missing"),
    "no output": ([ALPACA, {"instruction": "a", "input": ""}], "row 2: the column 'output' is missing"),
    "no instruction": ([{"output": "a"}], "row 1: the column 'instruction' is missing"),
    "output null": ([{"instruction": "a", "output": None}], "row 1: the column 'output' is missing"),
    "output a number": ([{**ALPACA, "output": 3}], "row 1: the value of 'output' is a number, not text"),
    "input a list": ([{**ALPACA, "input": ["a"]}], "row 1: the value of 'input' is a list, not text"),
    "system an object": ([{**ALPACA, "system": {}}], "row 1: the value of 'system' is an object"),
    "history text": ([{**ALPACA, "history": "a"}], "row 1: the value of 'history' is text, not a list"),
    "history triple": ([{**ALPACA, "history": [["a", "b", "c"]]}], "row 1: turn 1 of history is not a pair"),
    "history null": ([{**ALPACA, "history": [["a", None]]}], "row 1: turn 1 of history is not a pair"),
    "unknown sender": (
        [{"conversations": [{"from": "me", "value": "a"}]}],
        "row 1: turn 1 .* has the unknown role 'me'",
    ),
    "turn not an object": ([{"conversations": ["a"]}], "row 1: turn 1 .* is text instead of an object"),
    "value null": (
        [{"conversations": [{"from": "human", "value": None}]}],
        "row 1: the content of turn 1 .* is missing",
    ),
    "conversations text": ([{"conversations": "a"}], "row 1: the value of 'conversations' is text, not a list"),
    "no turns": ([{"conversations": []}], "row 1: the conversation has no question"),
    "assistant first": ([{"messages": MESSAGES[1:]}], "row 1: the conversation begins with the assistant's turn"),
    "unknown role": ([{"messages": [{"role": "bot", "content": "a"}]}], "row 1: message 1 has the unknown role 'bot'"),
    "content a number": ([{"messages": [{"role": "user", "content": 1}]}], "row 1: the content of message 1 .* not"),
    "mixed in a row": ([{**ALPACA, **SHAREGPT}], "row 1: the row mixes the formats Alpaca and ShareGPT"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_name_file_row_and_fix(write, name):
    content, problem = BAD_FILES[name]
    path = write(content)
    with pytest.raises(DataError, match=problem) as caught:
        data.load_messages(path)
    assert str(path) in caught.value.problem and caught.value.fix


def test_bad_jsonl_names_row_and_line(write):
    path = write('{"instruction": "a", "output": "b"}\n\n{oops}\n', "rows.jsonl")
    with pytest.raises(DataError, match=r"rows.jsonl, row 2 \(line 3\): it is not JSON"):
        data.read_rows(path)


def test_not_utf8_is_said(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes('[{"instruction": "苹果"}]'.encode("gbk"))
    with pytest.raises(DataError, match="is not UTF-8"):
        data.read_rows(path)


def test_a_byte_order_mark_does_no_harm(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ALPACA]), encoding="utf-8-sig")
    assert data.read_rows(path) == [ALPACA]


@pytest.mark.parametrize("source", ["gone.json", "no/such/folder/gone.jsonl", "gone", "gone/rows.csv.gz"])
def test_absent_files_are_said(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"{source} was not found"):
        data.read_rows(source)


def test_an_absent_name_in_a_folder_at_hand_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="data/dev was not found"):
        data.read_rows("data/dev")


def test_a_hub_id_without_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("GLM4_HOME", str(tmp_path))
    with pytest.raises(DataError, match="llamafactory/alpaca_gpt4_zh .* could not be read from Hugging Face") as caught:
        data.read_rows("llamafactory/alpaca_gpt4_zh")
    assert "modelscope" in caught.value.fix and "data/alpaca_gpt4_zh.json" in caught.value.fix


def test_a_local_copy_of_a_hub_id_is_taken_first(write, tmp_path, monkeypatch):
    monkeypatch.setenv("GLM4_HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    write([ALPACA], "data/alpaca_gpt4_zh.json")
    assert files.local_copy("llamafactory/alpaca_gpt4_zh") == tmp_path / "data" / "alpaca_gpt4_zh.json"
    assert data.read_rows("llamafactory/alpaca_gpt4_zh") == [ALPACA]


def test_modelscope_is_used_when_asked_for(tmp_path, monkeypatch):
    snapshot = pytest.importorskip("modelscope.hub.snapshot_download")
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "rows.json").write_text(json.dumps([ALPACA]), encoding="utf-8")
    (tmp_path / "repository" / "dataset_infos.json").write_text("{}", encoding="utf-8")
    download = create_autospec(snapshot.dataset_snapshot_download, return_value=str(tmp_path / "repository"))
    monkeypatch.setattr(snapshot, "dataset_snapshot_download", download)
    monkeypatch.setenv("GLM4_HOME", str(tmp_path))
    monkeypatch.setenv("GLM4_HUB", "modelscope")
    assert data.read_rows("owner/name") == [ALPACA]
    assert download.call_args.args == ("owner/name",)


def test_modelscope_absent_and_an_unknown_hub_are_said(tmp_path, monkeypatch):
    monkeypatch.setenv("GLM4_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", None)
    monkeypatch.setenv("GLM4_HUB", "modelscope")
    with pytest.raises(MachineError, match="modelscope can't be imported"):
        data.read_rows("owner/name")
    monkeypatch.setenv("GLM4_HUB", "github")
    with pytest.raises(SettingError, match="GLM4_HUB is 'github'"):
        data.read_rows("owner/name")


def test_ledger_counts_what_training_would_meet(write, nano_tokenizer):
    rows = rows_of(("一", "1"), ("一", "1"), ("二", ""), (" ", "3"), ("四", "4" * 20), ("五" * 20, "5"))
    dataset = data.load_messages(write(rows))
    ledger = report.ledger(nano_tokenizer, dataset, [8, 20, 100])
    assert (ledger["rows"], ledger["duplicates"]) == (6, 1)
    assert (ledger["empty_answers"], ledger["empty_questions"]) == (1, 1)
    assert ledger["longest"] == len(encode(nano_tokenizer, dataset[4]["messages"])["input_ids"])
    assert ledger["by_max_length"][1:] == [
        {"max_length": 20, "fit": 2, "lose_end": 1, "lose_answer": 1},
        {"max_length": 100, "fit": 4, "lose_end": 0, "lose_answer": 0},
    ]
    assert json.loads(json.dumps(ledger)) == ledger


def test_ledger_agrees_with_cutting(write, nano_tokenizer):
    row = rows_of(("一", "12"))
    dataset = data.load_messages(write(row))
    length = len(encode(nano_tokenizer, dataset[0]["messages"])["input_ids"])
    fates = report.ledger(nano_tokenizer, dataset, range(length - 4, length + 1))["by_max_length"]
    kinds = [next(key for key in ("fit", "lose_end", "lose_answer") if each[key]) for each in fates]
    # From the end: whole; without terminator; without the 2; only the newline; nothing of the answer.
    assert kinds[::-1] == ["fit", "lose_end", "lose_end", "lose_answer", "lose_answer"]


def test_encode_rows_drops_and_counts_but_never_cuts(write, nano_tokenizer, caplog):
    dataset = data.load_messages(write(rows_of(("一", "1"), ("二", " "), ("", "3"), ("四", "4" * 50))))
    with caplog.at_level(logging.WARNING, logger="glm4_helpers.data"):
        encoded = data.encode_rows(nano_tokenizer, dataset, max_length=30)
    assert encoded.column_names == ["input_ids", "labels"]
    assert encoded[0] == encode(nano_tokenizer, dataset[0]["messages"]) and len(encoded) == 1
    assert (
        "3 of 4 rows dropped: 1 longer than 30 tokens, such as “四”; 1 without an answer, such as “二”; " in caplog.text
    )
    assert "1 without a question, such as “3”" in caplog.text
    _, counts = data.encode_and_count(nano_tokenizer, dataset, 30)
    lost = {"too_long": 1, "empty_questions": 1, "empty_answers": 1, "untrained": 0}
    assert counts == {"rows": 4, "kept": 1, **lost}


def test_a_row_of_exactly_max_length_is_kept(write, nano_tokenizer):
    dataset = data.load_messages(write([ALPACA]))
    length = len(encode(nano_tokenizer, dataset[0]["messages"])["input_ids"])
    assert len(data.encode_rows(nano_tokenizer, dataset, length)) == 1
    with pytest.raises(DataError, match="No row is left.*1 longer than") as caught:
        data.encode_rows(nano_tokenizer, dataset, length - 1)
    assert f"has {length} tokens" in caught.value.fix


def test_every_row_without_answer_is_said(write, nano_tokenizer):
    dataset = data.load_messages(write(rows_of(("一", ""), ("二", ""))))
    with pytest.raises(DataError, match="No row is left.*2 without an answer"):
        data.encode_rows(nano_tokenizer, dataset, 100)


def test_a_last_turn_without_answer_counts_as_empty(write, nano_tokenizer):
    rows = [{"messages": [*MESSAGES, {"role": "user", "content": "还有？"}]}, {"messages": MESSAGES}]
    _, counts = data.encode_and_count(nano_tokenizer, data.load_messages(write(rows)), 512)
    assert (counts["kept"], counts["empty_answers"]) == (1, 1)


def test_terminator_reaches_the_labels(write, nano_tokenizer):
    encoded = data.encode_rows(nano_tokenizer, data.load_messages(write([ALPACA])), 512, terminator="<|user|>")
    assert nano_tokenizer.decode(encoded[0]["labels"][-1]) == "<|user|>"
    assert encoded[0]["labels"][0] == IGNORE


def test_split_is_stable_and_keeps_duplicates_together(write):
    train, dev = data.split(data.load_messages(write(many(400))), 0.1, seed=1)
    assert len(train) + len(dev) == 400 and 20 <= len(dev) <= 60
    held_out = {messages[0]["content"] for messages in dev["messages"]}
    more = [*reversed(many(400)), *many(400), {**ALPACA, "history": [["a", "b"]]}]
    train_2, dev_2 = data.split(data.load_messages(write(more)), 0.1, seed=1)
    again = {messages[0]["content"] for messages in dev_2["messages"]}
    assert again - {"a"} == held_out
    assert not again & {messages[0]["content"] for messages in train_2["messages"]}


def test_another_seed_gives_another_split(write):
    dataset = data.load_messages(write(many(100)))
    assert list(data.split(dataset, 0.2, 1)[1]["messages"]) != list(data.split(dataset, 0.2, 2)[1]["messages"])


def test_split_does_not_depend_on_the_nulls_of_a_table(write):
    rows = [{"messages": data.to_messages(row)} for row in many(50)]
    call = [*MESSAGES[:1], {**MESSAGES[1], "metadata": "tool"}]
    plain = data.split(data.load_messages(write(rows)), 0.2, 1)[1]
    mixed = data.split(data.load_messages(write([*rows, {"messages": call}])), 0.2, 1)[1]
    contents = [[[m["content"] for m in row] for row in part["messages"]] for part in (plain, mixed)]
    assert [row for row in contents[1] if row[1] != "apple"] == contents[0]


def test_split_edges(write):
    dataset = data.load_messages(write(many(3)))
    train, dev = data.split(dataset, 0.0, 1)
    assert (len(train), len(dev)) == (3, 0)
    for fraction in (1.0, -0.1):
        with pytest.raises(SettingError, match="dev_fraction"):
            data.split(dataset, fraction, 1)
    with pytest.raises(DataError, match="gives 1 to train on, 0 for dev"):
        data.split(dataset.select([0]), 1e-9, 1)


def test_fingerprint_tells_data_apart_and_nothing_else(write):
    rows = many(3)
    first = data.fingerprint(data.load_messages(write(rows)))
    assert len(first) == 64 and int(first, 16) >= 0
    assert data.fingerprint(data.load_messages(write(rows, "other.jsonl"))) == first
    assert data.fingerprint(data.load_messages(write(rows[::-1]))) != first
    assert data.fingerprint(data.load_messages(write([*rows[:2], {**rows[2], "output": "别的"}]))) != first
