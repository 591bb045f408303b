"""Rows as people bring them: files of every kind and shape load and train what they say, or are refused by name.

The table of all cases is printed when the tests are done. Examples follow the documentation of LLaMA-Factory, ms-swift,
TRL and OpenAI in words written for these tests.
"""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
import zipfile
from dataclasses import dataclass

import datasets as hf
import pandas
import pyarrow
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm4_helpers import data
from glm4_helpers.chat_format import IGNORE, encode, prompt_ids
from glm4_helpers.cli.commands import parse_setting
from glm4_helpers.profiles import get_profile
from glm4_helpers.rows import files, report
from glm4_helpers.support.errors import CourseError, DataError, MachineError, SettingError

FIELD = ROOT.parent / "shared" / "data" / "field"
"""Files after public bug reports, where they were laid beside the clone."""

TITLE = "own data: what is read, and what is refused"
END = "<|endoftext|>"
ALPACA = {"instruction": "翻译成英文。", "input": "苹果", "output": "apple"}
ASK = {"role": "user", "content": "北京天气？"}
ANSWER = {"role": "assistant", "content": "二十度。"}
FUNCTION = {"name": "get_weather", "description": "查天气", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"name": "get_weather", "arguments": {"city": "北京"}}
OPENAI_CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"北京"}'}}
CALLED = f'get_weather\n{{"city": "北京"}}{END}'


def learned(tokenizer, messages):
    return tokenizer.decode([label for label in encode(tokenizer, messages)["labels"] if label != IGNORE])


@dataclass(frozen=True)
class Read:
    """What a file must give: the shape, how many rows are kept, and what the last of them teaches."""

    shape: str
    kept: int
    teaches: str
    says: str = ""


def lines(*rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def packed(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return buffer.getvalue()


def table(*rows):
    return pyarrow.Table.from_pylist(list(rows))


def parquet(*rows):
    buffer = io.BytesIO()
    pandas.DataFrame(list(rows)).to_parquet(buffer)
    return buffer.getvalue()


def arrow(*rows, kind=pyarrow.ipc.new_stream):
    buffer = io.BytesIO()
    with kind(buffer, table(*rows).schema) as writer:
        writer.write_table(table(*rows))
    return buffer.getvalue()


APPLE = f"\napple{END}"
WEATHER = f"\n二十度。{END}"
TWO = lines(ALPACA, ALPACA)
PAIR = {"user": ASK["content"], "assistant": ANSWER["content"]}

CASES = {
    # How rows are written
    "list.jsonl": (json.dumps([ALPACA] * 2), Read("Alpaca", 2, APPLE)),
    "lines.json": (TWO, Read("Alpaca", 2, APPLE)),
    "LINES.NDJSON": (TWO, Read("Alpaca", 2, APPLE)),
    "lines without an ending": (TWO, Read("Alpaca", 2, APPLE)),
    "one.json": (json.dumps(ALPACA, indent=1), Read("Alpaca", 1, APPLE)),
    "bom in the middle.jsonl": ("\ufeff" + lines(ALPACA) + "\r\n\ufeff" + lines(ALPACA), Read("Alpaca", 2, APPLE)),
    "nan.json": (json.dumps([{**ALPACA, "system": float("nan"), "history": None}]), Read("Alpaca", 1, APPLE)),
    "table.csv": ('instruction,input,output\n"翻译\n成英文",苹果,apple\n', Read("Alpaca", 1, APPLE)),
    "excel of another country.csv": ("instruction;input;output\r\n译;苹果;apple\r\n", Read("Alpaca", 1, APPLE)),
    "table.tsv": ("instruction\tinput\toutput\n译, 好\t\tapple\n", Read("Alpaca", 1, APPLE)),
    "unicode text of Excel.txt": (
        "instruction\tinput\toutput\n译\t苹果\tapple\n".encode("utf-16"),
        Read("Alpaca", 1, APPLE, "utf-16"),
    ),
    "messages in a table.csv": (
        pandas.DataFrame([{"messages": json.dumps([ASK, ANSWER])}, {"messages": json.dumps([ASK, ANSWER])}])
        .assign(id=[1, 2])
        .to_csv(index=False),
        Read("messages", 2, WEATHER),
    ),
    "index column.csv": (pandas.DataFrame([ALPACA]).to_csv(), Read("Alpaca", 1, APPLE, "column (unnamed) (1)")),
    "utf16.json": (json.dumps([ALPACA], ensure_ascii=False).encode("utf-16"), Read("Alpaca", 1, APPLE, "utf-16")),
    "utf16 without mark.json": (json.dumps([ALPACA]).encode("utf-16-le"), Read("Alpaca", 1, APPLE, "utf-16-le")),
    "rows.jsonl.gz": (gzip.compress(TWO.encode()), Read("Alpaca", 2, APPLE)),
    "rows.csv.bz2": (bz2.compress(b"instruction,output\nx,apple\n"), Read("Alpaca", 1, APPLE)),
    "rows.xz": (lzma.compress(TWO.encode()), Read("Alpaca", 2, APPLE)),
    "rows.zip": (
        packed(a__json=TWO, b__csv="instruction,output\nx,apple\n", README__md="no", **{"__MACOSX/._a__json": "x"}),
        Read("Alpaca", 3, APPLE),
    ),
    "rows.parquet": (parquet(ALPACA, ALPACA), Read("Alpaca", 2, APPLE)),
    "calls.parquet": (
        parquet(
            *(
                {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [{"function": each}]}]}
                for each in ({"name": "other", "arguments": {"day": 1}}, CALL)
            )
        ),
        Read("messages", 2, CALLED),
    ),
    "stream.arrow": (arrow(ALPACA), Read("Alpaca", 1, APPLE)),
    "file.arrow": (arrow(ALPACA, kind=pyarrow.ipc.new_file), Read("Alpaca", 1, APPLE)),
    "gbk.json": (
        json.dumps([ALPACA], ensure_ascii=False).encode("gbk"),
        'Read as GBK, it has \'[{"instruction": "翻译成英文。',
    ),
    "gbk.csv": ("instruction,output\n翻译,apple\n".encode("gbk"), "'翻译,apple'"),
    "latin1.json": ('[{"instruction": "café"}]'.encode("latin-1"), "not UTF-8 text (byte 21)"),
    "pointer.json": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    "page.json": ("<!DOCTYPE html><html><body>404</body></html>", "is a web page or XML"),
    "._rows.json": (b"\x00\x05\x16\x07\x00", "macOS"),
    "rows.xls": (b"\xd0\xcf\x11\xe0\xa1\xb1", "old Excel"),
    "rows.npy": (b"\x93NUMPY\x01\x00v\x00", "binary file of a kind"),
    "broken.parquet": (b"PAR1" + b"x" * 20, "can't be read as Parquet"),
    "broken.gz": (b"\x1f\x8b" + b"x" * 20, "can't be read as gzip"),
    "prose.txt": ("天空是蓝色的。\n", "is not JSON, nor a table"),
    "ragged.csv": (
        "instruction,output\na,b\na,b,c\n",
        "ragged.csv, line 3: it has 3 cells, and there are 2 column names",
    ),
    "joined.csv": (
        "\ufeffinstruction,output\na,b\n\ufeffinstruction,output\nc,d\n",
        "line 3: it repeats the column names",
    ),
    "same name.csv": ("a,a\n1,2\n", "two columns of the same name"),
    "comments.json": ('[\n// one\n{"instruction": "a"}]', "is not JSON: Expecting value in line 2, column 1"),
    "single quotes.json": ("[{'instruction': 'a'}]", "line 1, column 3"),
    # Shapes
    "capitals.json": ([{" Instruction": "a", "Output ": "apple", "INPUT": ""}], Read("Alpaca", 1, APPLE)),
    "input and output.json": ([{"input": "苹果", "output": "apple"}], Read("Alpaca", 1, APPLE)),
    "history of messages.json": ([{**ALPACA, "history": [ASK, ANSWER]}], Read("Alpaca", 1, WEATHER + APPLE)),
    "dolly.json": (
        [{"instruction": "a", "context": "b", "response": "apple", "category": "x"}],
        Read("Dolly", 1, APPLE, "column category (1)"),
    ),
    "swift query.json": (
        [{"system": "s", "query": "a", "response": "apple", "history": [["q", "r"]]}],
        Read("query/response", 1, f"\nr{END}{APPLE}"),
    ),
    "swift conversation.json": ([{"conversation": [{"human": "a", "assistant": "apple"}]}], Read("ms-swift", 1, APPLE)),
    "xtuner.json": ([{"conversation": [{"system": "s", "input": "a", "output": "apple"}]}], Read("ms-swift", 1, APPLE)),
    "question.csv": ("question,answer\na,apple\n", Read("question/answer", 1, APPLE)),
    "advertise.json": ([{"content": "类型#裤", "summary": "apple"}], Read("AdvertiseGen", 1, APPLE)),
    "trl texts.json": ([{"prompt": "a", "completion": "apple"}], Read("prompt/completion", 1, APPLE)),
    "trl messages.json": (
        [{"prompt": [ASK, ANSWER, ASK], "completion": [{"role": "assistant", "content": "apple"}]}],
        Read("prompt/completion", 1, APPLE, "not trained: 1"),
    ),
    "sharegpt.json": (
        [{"conversations": [{"from": "Human", "value": "a"}, {"from": "ChatGPT", "value": "apple"}]}],
        Read("ShareGPT", 1, APPLE),
    ),
    "sharegpt roles.json": ([{"conversations": [ASK, ANSWER]}], Read("ShareGPT", 1, WEATHER)),
    "developer.json": (
        [{"messages": [{"role": "developer", "content": "s"}, ASK, ANSWER]}],
        Read("messages", 1, WEATHER),
    ),
    "parts.json": (
        [
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                    ANSWER,
                ]
            }
        ],
        Read("messages", 1, WEATHER),
    ),
    "two shapes.json": ([ALPACA, {"messages": [ASK, ANSWER]}], Read("Alpaca", 2, WEATHER, "1 messages")),
    "ultrachat.json": (
        [{"prompt": "北京天气？", "prompt_id": "1", "messages": [ASK, ANSWER]}],
        Read("messages", 1, WEATHER, "column prompt (1), column prompt_id (1)"),
    ),
    "chinese columns.csv": ("问题,答案\na,b\n", "--set 'columns={问题: instruction, 答案: output}'"),
    "text.json": ([{"text": "天空是蓝色的。"}], "text alone, as pretraining uses"),
    "pretraining.json": ([{"messages": [ANSWER]}], "begins with the assistant's turn"),
    "two systems.json": (
        [
            {
                "system": "a",
                "conversations": [
                    {"from": "system", "value": "b"},
                    {"from": "human", "value": "c"},
                    {"from": "gpt", "value": "d"},
                ],
            }
        ],
        "a system prompt in its turns and one beside them",
    ),
    "two of a name.json": (
        [{"Output": "a", "output": "b", "instruction": "c"}],
        "two of its columns are called 'output'",
    ),
    "numbers.json": ([{**ALPACA, "output": 42}], "'output' is a number, not text"),
    # Tools
    "function_call.json": (
        [
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": json.dumps(CALL)},
                    {"from": "observation", "value": "20"},
                    {"from": "gpt", "value": "二十度。"},
                ],
                "tools": json.dumps([FUNCTION]),
            }
        ],
        Read("ShareGPT", 1, CALLED + WEATHER),
    ),
    "tool_calls.jsonl": (
        [
            {
                "messages": [
                    ASK,
                    {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
                    {"role": "tool", "tool_call_id": "c1", "content": "20"},
                    ANSWER,
                ],
                "tools": TOOLS,
                "parallel_tool_calls": False,
            }
        ],
        Read("messages", 1, CALLED + WEATHER, "column parallel_tool_calls (1)"),
    ),
    "text and two calls.json": (
        [
            {
                "messages": [ASK, {"role": "assistant", "content": "我查。", "tool_calls": [OPENAI_CALL] * 2}],
                "tools": TOOLS,
            }
        ],
        Read("messages", 1, f"\n我查。<|assistant|>{CALLED.removesuffix(END)}<|assistant|>{CALLED}"),
    ),
    "functions.json": (
        [
            {
                "messages": [
                    ASK,
                    {"role": "assistant", "content": "", "function_call": CALL},
                    {"role": "function", "name": "get_weather", "content": "20"},
                    ANSWER,
                ],
                "functions": [FUNCTION],
            }
        ],
        Read("messages", 1, CALLED + WEATHER),
    ),
    "swift tools.jsonl": (
        [
            {
                "tools": json.dumps(TOOLS),
                "messages": [
                    ASK,
                    {"role": "tool_call", "content": json.dumps(CALL)},
                    {"role": "tool_call", "content": json.dumps(CALL)},
                    {"role": "tool_response", "content": "20"},
                    {"role": "tool_response", "content": "20"},
                    ANSWER,
                ],
            }
        ],
        Read("messages", 1, f"{CALLED.removesuffix(END)}<|assistant|>{CALLED}{WEATHER}"),
    ),
    "glm4 tools.json": (
        [
            {
                "messages": [
                    {"role": "system", "content": "", "tools": TOOLS},
                    ASK,
                    {"role": "assistant", "metadata": "get_weather", "content": '{"city": "北京"}'},
                ]
            }
        ],
        Read("messages", 1, CALLED),
    ),
    "parts with a call.jsonl": (
        [
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "value": "a"}], "loss_weight": 0.0},
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "reasoning", "value": "想"},
                            {"type": "tool_call", "value": json.dumps(CALL)},
                        ],
                        "loss_weight": 1.0,
                    },
                ]
            }
        ],
        Read("messages", 1, CALLED, "message part reasoning (1)"),
    ),
    "call without a name.json": (
        [{"messages": [ASK, {"role": "tool_call", "content": "查天气"}]}],
        "message 2 (tool_call) has a call that is not a function's name",
    ),
    "python tool.json": (
        [{"messages": [ASK, ANSWER], "tools": [{"type": "python"}]}],
        "a tool that is not a named function",
    ),
    # Masks, and other training
    "weights.jsonl": (
        [{"messages": [ASK, {**ANSWER, "weight": 0}, ASK, {"role": "assistant", "content": "apple", "weight": 1}]}],
        Read("messages", 1, APPLE, "not trained: 1"),
    ),
    "loss.jsonl": (
        [{"messages": [ASK, {**ANSWER, "loss": False}, ASK, {"role": "assistant", "content": "apple", "loss": True}]}],
        Read("messages", 1, APPLE, "not trained: 1"),
    ),
    "whole row.json": ([ALPACA, {**ALPACA, "weight": 0}], Read("Alpaca", 1, APPLE, "not trained: 1")),
    "half a weight.json": (
        [{"messages": [ASK, {**ANSWER, "weight": 0.5}]}],
        "the weight of message 2 (assistant) is 0.5",
    ),
    "trained user.json": ([{"messages": [{**ASK, "train": True}, ANSWER]}], "message 1 (user) is to be trained"),
    "cut answer.json": (
        [{"messages": [ASK, {"role": "assistant", "content": "不是，我", "ended_by": "limit"}]}],
        Read("messages", 1, "\n不是，我", "whose end is not trained: 1"),
    ),
    "reasoning.json": (
        [{"messages": [ASK, {**ANSWER, "reasoning_content": "想"}]}],
        Read("messages", 1, WEATHER, "message key reasoning_content (1)"),
    ),
    "placeholder.json": (
        [{"instruction": "a", "output": "我是 {{name}}。"}],
        Read("Alpaca", 1, "\n我是 {{name}}。" + END, "placeholder such as {{name}}, which is taught as it is: 1"),
    ),
    "kto.json": ([ALPACA, {**ALPACA, "kto_tag": False}], "row 2: it is marked as a bad answer (kto_tag false)"),
    "kto numbers.csv": ("question,answer,kto_tag\na,b,1\na,b,0\n", "line 3: it is marked as a bad answer (kto_tag 0)"),
    "class label.json": ([{**ALPACA, "label": 0}], Read("Alpaca", 1, APPLE, "column label (1)")),
    "kto label.json": ([{"messages": [ASK, ANSWER], "label": False}], "marked as a bad answer (label false)"),
    "good label.json": ([{"messages": [ASK, ANSWER], "label": True}], Read("messages", 1, WEATHER)),
    "dpo.json": (
        [{"instruction": "a", "input": "", "chosen": "b", "rejected": "c"}],
        "'chosen' holds a preference pair: rows for DPO",
    ),
    "dpo of swift.json": (
        [{"messages": [ASK, ANSWER], "rejected_response": "c"}],
        "'rejected_response' holds a preference pair",
    ),
    "images.json": ([{"messages": [ASK, ANSWER], "images": ["cat.jpg"]}], "'images' holds images"),
    "no images.json": ([{"messages": [ASK, ANSWER], "images": [], "audios": None}], Read("messages", 1, WEATHER)),
    "image part.json": (
        [{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER]}],
        "a part of type image_url",
    ),
}


def bytes_of(content):
    if isinstance(content, list):
        content = json.dumps(content, ensure_ascii=False)
    return content.encode() if isinstance(content, str) else content


def outcome(tokenizer, source):
    """What a user is told of a file: shapes, rows kept, turns masked, rows refused, and the message."""
    try:
        dataset, found = data.load_and_count(source)
        _, counts = data.encode_and_count(tokenizer, dataset, 512)
    except CourseError as error:
        return "", 0, 0, str(error)
    return ", ".join(found["shapes"]), counts["kept"], found["masked_turns"], report.rows_report(dataset, found)


def shown(name, shapes, kept, masked, says, folder):
    says = says.replace(f"{folder}/", "").replace("\n", " | ")
    return f"{name[:28]:<28} {shapes[:20]:<20} {kept:>4} {masked:>4}  {says[:150]}"


@pytest.mark.parametrize("name", CASES)
def test_a_file_trains_what_it_says_or_is_refused_by_name(name, tmp_path, nano_tokenizer, report):
    content, expected = CASES[name]
    file = tmp_path / name
    file.write_bytes(bytes_of(content))
    shapes, kept, masked, says = outcome(nano_tokenizer, file)
    report(
        TITLE, shown("file", "shape", 0, 0, "(rows kept, turns masked, what is said)", tmp_path), -1
    ) if name == next(iter(CASES)) else None
    report(TITLE, shown(name, shapes, kept, masked, says, tmp_path), list(CASES).index(name))
    if isinstance(expected, str):
        assert kept == 0 and expected in says and name in says and "Fix: " in says
    else:
        assert (shapes.split(", ")[0], kept) == (expected.shape, expected.kept), says
        assert expected.says in says
        kept_rows = [each for each in data.load_messages(file)["messages"] if data.can_be_learned(each)]
        assert learned(nano_tokenizer, kept_rows[-1]) == expected.teaches


@pytest.mark.skipif(not FIELD.is_dir(), reason="the files after public reports are not beside this clone")
def test_every_file_of_the_field_is_read_or_refused_with_a_fix(nano_tokenizer, report):
    read = {}
    for number, path in enumerate(sorted(FIELD.iterdir())):
        shapes, kept, masked, says = outcome(nano_tokenizer, path)
        report(TITLE, shown(f"field/{path.name}", shapes, kept, masked, says, FIELD), 1000 + number)
        assert kept or (path.name in says and "Fix: " in says), (path.name, says)
        read[path.name] = kept
    assert read["folder_mixed"] == 3 and read["lf_glaive.json"] == 1 and read["lf_kto_alpaca.json"] == 0


# Folders, several files and hubs


@pytest.fixture
def rows_folder(tmp_path):
    """Two files of rows, one of them deep, with what people have beside them."""
    (tmp_path / "rows" / "deep").mkdir(parents=True)
    (tmp_path / "rows" / "A.JSON").write_text(json.dumps([ALPACA]))
    (tmp_path / "rows" / "deep" / "b.csv.gz").write_bytes(gzip.compress(b"question,answer\na,b\n"))
    for name in ("._A.JSON", ".hidden.json", "dataset_info.json", "README.md", "deep/.DS_Store"):
        (tmp_path / "rows" / name).write_bytes(b"\x00\x05\x16\x07")
    return tmp_path / "rows"


def test_a_folder_is_read_with_all_below_it_and_says_what_it_did_not_read(rows_folder, caplog):
    dataset, found = data.load_and_count(rows_folder)
    assert found["shapes"] == {"Alpaca": 1, "question/answer": 1} and len(dataset) == 2
    data.load_messages(rows_folder)
    assert "files not read: 2, README.md, dataset_info.json" in caplog.text


def test_several_sources_are_read_one_after_the_other(rows_folder, monkeypatch):
    monkeypatch.setenv("GLM4_HOME", str(rows_folder.parent))
    train_data = parse_setting("train_data=[rows/A.JSON, rows/deep]")[1]
    profile = get_profile(train_data=train_data)
    assert profile.train_data == ("rows/A.JSON", "rows/deep")
    assert len(data.profile_rows(profile, "train_data")[0]) == 2


def test_what_save_to_disk_wrote_is_read(tmp_path, nano_tokenizer):
    rows = hf.Dataset.from_list([ALPACA, {**ALPACA, "history": [["q", "r"]]}])
    rows.save_to_disk(str(tmp_path / "one"))
    hf.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(str(tmp_path / "several"))
    hf.DatasetDict({"a": rows, "b": rows.select([0])}).save_to_disk(str(tmp_path / "unclear"))
    assert len(data.load_messages(tmp_path / "one")) == len(data.load_messages(tmp_path / "several")) == 2
    with pytest.raises(DataError, match="has the splits a, b, and none is called train") as caught:
        data.load_messages(tmp_path / "unclear")
    assert len(data.load_messages(caught.value.fix.removeprefix("Name one, as in ").removesuffix("."))) == 2


def test_configuration_and_split_of_a_hub_set_are_named_behind_its_id(tmp_path, monkeypatch):
    """A folder stands in for the hub: load_dataset reads both in the same way."""
    (tmp_path / "set").mkdir()
    for name, answer in (("zh", "二十度。"), ("en", "apple")):
        (tmp_path / "set" / f"{name}.json").write_text(
            json.dumps([{"question": "a", "answer": answer}]), encoding="utf-8"
        )
    configurations = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {name}.json\n"
        for name, split in (("zh", "train"), ("en", "validation"))
    )
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{configurations}---\n")
    load = hf.load_dataset
    monkeypatch.setattr(
        hf,
        "load_dataset",
        lambda name, *rest, **more: load(str(tmp_path / "set"), *rest, **more, cache_dir=str(tmp_path)),
    )
    monkeypatch.setenv("GLM4_HOME", str(tmp_path))
    assert data.load_messages("owner/set:zh")["messages"][0][1]["content"] == "二十度。"
    for name in ("owner/set:en", "owner/set:en:validation"):
        assert data.load_messages(name)["messages"][0][1]["content"] == "apple"
    with pytest.raises(DataError, match="Config name is missing.*'zh'") as caught:
        data.load_messages("owner/set")
    assert "owner/name:configuration" in caught.value.fix
    assert files.local_copy("owner/set:zh").name == "set-zh.json"


def test_excel_is_read_where_openpyxl_is_installed(tmp_path, monkeypatch):
    file = tmp_path / "rows.xlsx"
    file.write_bytes(packed(**{"[Content_Types]__xml": "", "xl/workbook__xml": ""}))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "openpyxl", None)
        with pytest.raises(MachineError, match="Excel file") as caught:
            data.load_messages(file)
        assert "pip install openpyxl" in caught.value.fix and "CSV" in caught.value.fix
    pytest.importorskip("openpyxl")
    pandas.DataFrame([ALPACA, {**ALPACA, "input": None}, {**ALPACA, "output": 3}]).to_excel(
        file, index=False, sheet_name="一"
    )
    with pytest.raises(DataError, match="rows.xlsx, sheet 一, row 4: the value of 'output' is a number"):
        data.load_messages(file)
    dataset = data.load_messages(file, skip_bad=True)
    assert [messages[0]["content"] for messages in dataset["messages"]] == ["翻译成英文。\n\n苹果", "翻译成英文。"]


def test_a_cell_may_be_as_long_as_a_book(tmp_path):
    (tmp_path / "long.csv").write_text(f"question,answer\na,{'好' * 200_000}\n", encoding="utf-8")
    assert len(data.load_messages(tmp_path / "long.csv")["messages"][0][1]["content"]) == 200_000


def test_the_line_that_converts_gbk_works(tmp_path):
    (tmp_path / "mine.json").write_bytes(json.dumps([ALPACA], ensure_ascii=False).encode("gbk"))
    with pytest.raises(DataError) as caught:
        data.load_messages(tmp_path / "mine.json")
    code = caught.value.fix.split('python -c "')[1].split('" and use')[0]
    subprocess.run([sys.executable, "-c", code], check=True)
    assert data.read_rows(tmp_path / "utf8-mine.json") == [ALPACA]


# Settings and the report


def test_columns_of_other_names_get_a_meaning(tmp_path, caplog):
    (tmp_path / "mine.csv").write_text("问题,答案,来源\n你好,你好！,书\n", encoding="utf-8")
    key, value = parse_setting("columns={问题: instruction, 答案: output}")
    profile = get_profile(**{key: value, "train_data": str(tmp_path / "mine.csv")})
    dataset, found = data.profile_rows(profile, "train_data")
    assert dataset["messages"][0][1]["content"] == "你好！"
    assert report.rows_report(dataset, found).splitlines()[1:] == ["ignored: column 来源 (1)"]
    data.load_messages(tmp_path / "mine.csv", {**value, "问提": "system"})
    assert "no row has the column 问提" in caplog.text
    with pytest.raises(SettingError, match="'问题' the unknown meaning 'instructon'"):
        data.load_messages(tmp_path / "mine.csv", {"问题": "instructon"})
    assert data.to_messages(data.read_rows(tmp_path / "mine.csv", value)[0])[1]["content"] == "你好！"
    (tmp_path / "spaces.csv").write_text(" ID , 问题 ,答案\n7,你好,你好！\n", encoding="utf-8")
    assert data.load_messages(tmp_path / "spaces.csv", value)["id"] == ["7"]
    with pytest.raises(SettingError, match="columns can't be"):
        get_profile(columns={"问题": 3})


def test_bad_rows_are_counted_and_can_be_left_out(tmp_path):
    rows = [ALPACA, {"instruction": "a"}, "x", {**ALPACA, "output": 1}, {"instruction": "b"}, ALPACA]
    (tmp_path / "rows.jsonl").write_text(lines(*rows) + "\n{oops}\n", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"^5 of 7 rows can't be used\. .*row 2 \(line 2\): .*row 3 .*row 4 .*and 2 more"
    ) as caught:
        data.load_messages(tmp_path / "rows.jsonl")
    assert "--set skip_bad_rows=true" in caught.value.fix
    profile = get_profile(skip_bad_rows=True, train_data=str(tmp_path / "rows.jsonl"))
    dataset, found = data.profile_rows(profile, "train_data")
    said = report.rows_report(dataset, found)
    assert len(dataset) == 2 and "rows left out: 2, the column 'output' is missing" in said and "row 5 (line 5)" in said
    with pytest.raises(DataError, match="1 of 1|row 1") as caught:
        data.load_messages(_written(tmp_path / "all.json", [{"instruction": "a"}]), skip_bad=True)
    assert "skip_bad_rows" not in caught.value.fix


def _written(path, rows):
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def test_the_report_tells_copies_near_copies_and_rows_that_judge_themselves(tmp_path):
    rows = [ALPACA, ALPACA, {**ALPACA, "output": "Ａpple "}, {**ALPACA, "input": "梨", "output": "pear"}]
    dataset, found = data.load_and_count(_written(tmp_path / "rows.json", rows))
    dev = data.load_messages(
        _written(tmp_path / "dev.json", [{**ALPACA, "output": "apple。"}, {**ALPACA, "input": "桃"}])
    )
    said = report.rows_report(dataset, found, {"dev rows": dev}).splitlines()
    assert said == [
        "4 rows read (4 Alpaca)",
        "rows equal to an earlier one: 1",
        "rows equal to another but for spaces, punctuation, case and width: 1",
        "dev rows that are also in the training rows, and so can't judge it: 1 of 2",
    ]


def test_the_courses_own_rows_are_read_without_a_word(caplog):
    dataset, found = data.load_and_count(ROOT / "data" / "train.json")
    assert found["rows"] == len(dataset) and not report.findings(found)


# Any content


def not_blank(text):
    return bool(text.strip())


CONTROL = st.sampled_from(
    ["<|user|>", "<|assistant|>\n好", "[gMASK]<sop>", "<|endoftext|>", "\ufeff", "\r", '"', ",", "NaN", "{{x}}"]
)
CONTENT = st.lists(st.text(max_size=12) | CONTROL, min_size=1, max_size=4).map("".join).filter(not_blank)
ARGUMENTS = st.dictionaries(
    st.text(min_size=1, max_size=5), st.text(max_size=8) | st.integers() | st.booleans(), max_size=3
)
SAID = st.tuples(CONTENT, st.sampled_from([None, 0, 1, True, False, 1.0]))
CALLED_FUNCTION = st.tuples(st.sampled_from(["get_weather", "加法"]), ARGUMENTS)
TURN = st.tuples(CONTENT, st.none() | CALLED_FUNCTION, SAID)
quick = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def openai_row(turns):
    messages = []
    for question, called, (answer, weight) in turns:
        messages.append({"role": "user", "content": question})
        if called:
            function = {"name": called[0], "arguments": json.dumps(called[1])}
            messages.append(
                {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
            )
            messages.append({"role": "tool", "content": "20"})
        messages.append({"role": "assistant", "content": answer, "weight": weight})
    return {"messages": messages, "tools": TOOLS}


@quick
@given(turns=st.lists(TURN, min_size=1, max_size=3))
def test_exactly_what_the_row_says_is_trained_and_no_text_makes_a_control_token(turns, nano_tokenizer):
    messages = data.to_messages(openai_row(turns))
    encoded = encode(nano_tokenizer, messages)
    wanted, roles = "", ["[gMASK]", "<sop>", "<|system|>"]
    for _, called, (answer, weight) in turns:
        roles += ["<|user|>", *(["<|assistant|>", "<|observation|>"] if called else []), "<|assistant|>"]
        wanted += f"{called[0]}\n{json.dumps(called[1], ensure_ascii=False)}{END}" if called else ""
        wanted += f"\n{answer}{END}" if weight is None or weight else ""
    assert learned(nano_tokenizer, messages) == wanted
    control = set(nano_tokenizer.get_added_vocab().values())
    placed = [nano_tokenizer.decode(token) for token in encoded["input_ids"] if token in control]
    assert placed == [*roles, END]
    text = nano_tokenizer.decode(encoded["input_ids"])
    assert all(question in text and answer in text for question, _, (answer, _) in turns)
    asked = prompt_ids(nano_tokenizer, messages[:-1])
    assert encoded["input_ids"][: len(asked)] == asked


@quick
@given(rows=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4))
def test_every_way_of_writing_rows_gives_the_same_messages(rows, tmp_path):
    table = [{"instruction": question, "output": answer} for question, answer in rows]
    expected = [data.to_messages(row) for row in table]
    frame = pandas.DataFrame(table)
    for name, write in {
        "rows.json": lambda path: path.write_text(json.dumps(table), encoding="utf-8"),
        "rows.jsonl": lambda path: path.write_text(lines(*table), encoding="utf-8"),
        "rows.csv": lambda path: frame.to_csv(path, index=False, quoting=1),
        "rows.tsv.gz": lambda path: frame.to_csv(path, index=False, sep="\t", quoting=1),
        "rows.parquet": frame.to_parquet,
    }.items():
        write(tmp_path / name)
        if ".csv" in name or ".tsv" in name:  # tables write NaN where there is nothing, so it can't be an answer
            if any("NaN" in pair for pair in rows) or any(pair[0].startswith("\ufeff") for pair in rows):
                continue
        assert list(data.load_messages(tmp_path / name)["messages"]) == expected, name
