"""Own rows, from odd files to the page "Your own assistant in ten minutes", whose commands are run as written."""

import json
import os
import re
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

from glm4_helpers.data import load_and_count
from glm4_helpers.support.errors import DataError

FOLDER = ROOT / "notebooks" / "own_assistant"
ROW = '{"instruction": "你是谁？", "output": "我是小灯。"}'


def test_commas_that_spreadsheets_leave_at_the_end_of_lines_are_no_columns(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("instruction,output,,\n你好,你好！,,\n再见,走好！,,\n", encoding="utf-8")
    rows, found = load_and_count(file)
    assert [messages[-1]["content"] for messages in rows["messages"]] == ["你好！", "走好！"] and not found["ignored"]


@pytest.mark.parametrize(
    "name, text, said, fix",
    [
        ("no names.csv", "你是谁？,我是小灯。\n再见。,走好！\n", "line 2: it has sentences where", "Name the columns"),
        ("pairs.json", '{"你是谁？": "我是小灯。", "再见。": "走好！"}', "it has sentences where", "write each row"),
        ("wide.csv", "问题，答案\n你好，你好！\n", "it begins with '问题，答案'", "Put a comma (,) between cells"),
        ("commas.jsonl", f"{ROW},\n{ROW},\n", "row 1 (line 1): it is not JSON", "without the comma after it"),
        ("one comma.jsonl", f"{ROW},\n{ROW}\n", "row 1 (line 1): it is not JSON", "without the comma after it"),
        ("lists.jsonl", '["你好", "你好！"]\n["再见", "走好！"]\n', "is not JSON", "JSON Lines have one object a line"),
        ("quotes.tsv", 'instruction\toutput\n说\t"好"是吧\n', "line 2 is not CSV", "is written twice"),
    ],
)
def test_an_odd_file_is_refused_with_the_way_to_correct_it(name, text, said, fix, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_and_count(tmp_path / name)
    assert said in caught.value.problem and fix in caught.value.fix, caught.value


def test_an_empty_zip_is_called_one(tmp_path):
    zipfile.ZipFile(tmp_path / "rows.zip", "w").close()
    with pytest.raises(DataError, match="is an empty zip file"):
        load_and_count(tmp_path / "rows.zip")


def test_columns_with_numbers_and_notes_are_not_taken_for_the_question(tmp_path):
    file = tmp_path / "sheet.csv"
    file.write_text("编号,问题,答案,备注\n1,你是谁？,我是阿桥。,\n2,再见！,走好。,短\n", encoding="utf-8")
    with pytest.raises(DataError, match="no known format") as caught:
        load_and_count(file)
    assert "--set 'columns={问题: instruction, 答案: output}'" in caught.value.fix
    rows, found = load_and_count(file, {"问题": "instruction", "答案": "output"})
    assert len(rows) == 2 and found["ignored"] == {"column 编号": 2, "column 备注": 1}


def test_the_page_has_60_rows_and_asks_in_other_wordings():
    rows, asked = (json.loads((FOLDER / name).read_text(encoding="utf-8")) for name in ("train.json", "test/lamp.json"))
    trained = {row["instruction"] for row in rows}
    assert len(trained) == len(rows) == 60 and not trained & {row["instruction"] for row in asked}
    assert {row["output"] for row in asked} == {row["output"] for row in rows}


def right_after(printed, name):
    """Of a set's line in the table of `evaluate`: the percentage after fine-tuning."""
    return float(re.search(rf"{name} \(right\).*\]\s+([\d.]+)%", printed)[1])


@pytest.mark.slow
def test_the_commands_of_the_page_run_and_show_what_it_says(tmp_path, report):
    for name in ("glm4_helpers", "weights", "data", "notebooks"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "GLM4_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": path}
    printed = []
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", (FOLDER / "README.md").read_text("utf-8"), re.S):
        command = ["bash", "-ec", block] if language == "bash" else [sys.executable, "-c", block]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, input="", text=True, encoding="utf-8", capture_output=True
        )
        assert done.returncode == 0, block + done.stderr
        printed.append(done.stdout + done.stderr)
    alone, mixed = [text for text in printed if "lamp (right)" in text]
    figures = {f"{name}, {run}": right_after(text, name) for run, text in (("alone", alone), ("mixed", mixed))
               for name in ("lamp", "world")}  # fmt: skip
    report("your own assistant", ", ".join(f"{name} {figure} %" for name, figure in figures.items()))
    assert min(figures["lamp, alone"], figures["lamp, mixed"], figures["world, mixed"]) >= 75, figures
    assert figures["world, alone"] <= 10, figures
    answers = [text for text in printed if "灯亮着呢" in text and "/help" in text]
    assert len(answers) == 1 and "elephant" in answers[0], answers
