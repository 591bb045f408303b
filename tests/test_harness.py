"""The README's lines for public benchmarks: lm-eval itself with glm4-nano and an adapter, on a small task, offline."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import NANO, ROOT
from optional_packages import lm_eval
from tiny_models import save_live_adapter

from glm4_helpers.profiles import get_profile

QUESTIONS = [
    {"question": f"{number}等于多少？", "A": "苹果", "B": "香蕉", "answer": "AB"[number % 2]} for number in range(8)
]
TASK = """\
task: little_quiz
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nA. {{{{A}}}}\\nB. {{{{B}}}}\\n答案："
doc_to_choice: ["A", "B"]
doc_to_target: "{{{{['A', 'B'].index(answer)}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
# lm-eval's own command line, telling on the way with which two ids each text begins.
SPY = """
from lm_eval.__main__ import cli_evaluate
from lm_eval.models.huggingface import HFLM

ask = HFLM._model_call

def spy(self, inps, *arguments, **keywords):
    print("FIRST", *inps[:, :2].tolist(), sep="; ")
    return ask(self, inps, *arguments, **keywords)

HFLM._model_call = spy
cli_evaluate()
"""


def readme_lines(name):
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^python -m lm_eval (--model .*)$", text, re.MULTILINE)


def test_both_readmes_show_the_same_lines():
    lines = readme_lines("README.md")
    assert [("peft=" in line) for line in lines] == [False, True]
    assert lines == readme_lines("README.zh.md")


@pytest.mark.slow
def test_the_readmes_lines_score_a_task_before_and_after(tmp_path, nano_tokenizer):
    path = lm_eval()
    (tmp_path / "base").symlink_to(NANO)  # lm-eval takes no path with a space, and a clone may have one
    save_live_adapter(tmp_path / "adapter", get_profile("glm4-nano"), std=1.0)
    (tmp_path / "questions.json").write_text(json.dumps(QUESTIONS, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "little_quiz.yaml").write_text(TASK.format(data=tmp_path / "questions.json"), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": path, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    prefix = nano_tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    scored = []
    for number, line in enumerate(readme_lines("README.md")):
        for given, ours in (
            ("weights/glm-4-9b-hf", "base"),
            ("outputs/glm-4-9b-lora/adapter", "adapter"),
            ("ceval-valid_law", "little_quiz"),
            ("--limit 50", "--limit 6"),
        ):
            line = line.replace(given, ours)
        words = [*line.split(), "--include_path", str(tmp_path), "--output_path", str(tmp_path / f"{number}.json")]
        done = subprocess.run(
            [sys.executable, "-c", SPY, *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert re.search(r"\|little_quiz\s*\|", done.stdout) and "acc" in done.stdout, "the table of lm-eval"
        told = [line.split("; ")[1:] for line in done.stdout.splitlines() if line.startswith("FIRST")]
        firsts = {first for line in told for first in line}
        assert firsts == {str(prefix)}, "the model's prefix stands in front of every text"
        [results] = tmp_path.glob(f"{number}*.json")
        scored.append(json.loads(results.read_text(encoding="utf-8"))["results"]["little_quiz"]["acc,none"])
    assert all(0 <= accuracy <= 1 and round(accuracy * 6, 6) % 1 == 0 for accuracy in scored)
