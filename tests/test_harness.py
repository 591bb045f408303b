"""Public benchmarks through lm-eval: a small task of our own, offline; skipped where the optional package is absent."""

import json
import sys

import pytest
import torch
from optional_packages import import_from_lm_eval
from tiny_models import save_live_adapter, save_model, tiny_glm, tiny_tokenizer

from glm4_helpers import harness
from glm4_helpers.__main__ import main
from glm4_helpers.errors import DataError, MachineError
from glm4_helpers.profiles import get_profile

QUESTIONS = [{"question": f"{number}等于多少？", "A": "苹果", "B": "香蕉", "answer": "AB"[number % 2]} for number in range(8)]
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


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A tiny model with the 9B profile's name and settings, an adapter for it, and a task."""
    monkeypatch.setenv("GLM4_HOME", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = tiny_tokenizer()
    save_model(tmp_path / "weights" / "glm-4-9b-hf", tiny_glm(tokenizer).to(torch.bfloat16), tokenizer)
    profile = get_profile("glm-4-9b-lora")
    save_live_adapter(tmp_path / "adapter", profile, std=1.0)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "questions.json").write_text(json.dumps(QUESTIONS, ensure_ascii=False), encoding="utf-8")
    task = TASK.format(data=tmp_path / "tasks" / "questions.json")
    (tmp_path / "tasks" / "little_quiz.yaml").write_text(task, encoding="utf-8")
    return tmp_path


def evaluate(course, *options):
    line = ["evaluate", "--profile", "glm-4-9b-lora", "--adapter", str(course / "adapter"), "--json"]
    return main([*line, "--tasks", str(course / "tasks"), "--harness", *options])


@pytest.mark.slow
def test_a_task_is_scored_before_and_after(course, capsys, monkeypatch):
    HFLM = import_from_lm_eval("lm_eval.models.huggingface", monkeypatch).HFLM
    seen = []
    ask = HFLM._model_call

    def spy(self, inps, *arguments, **keywords):
        seen.extend(inps[:, :2].tolist())
        return ask(self, inps, *arguments, **keywords)

    monkeypatch.setattr(HFLM, "_model_call", spy)
    assert evaluate(course, "little_quiz", "--limit", "6") == 0
    result = json.loads(capsys.readouterr().out)
    accuracies = [result[side]["little_quiz"]["acc"] for side in ("before", "after")]
    assert all(0 <= accuracy <= 1 and round(accuracy * 6, 6) % 1 == 0 for accuracy in accuracies)
    prefix = tiny_tokenizer().convert_tokens_to_ids(["[gMASK]", "<sop>"])
    assert seen and all(first == prefix for first in seen), "the model's prefix stands in front of every text"
    assert "little_quiz" in harness.format_tasks(result) and "±" in harness.format_tasks(result)


@pytest.mark.slow
def test_unknown_tasks_and_data_that_cannot_be_fetched_are_named(course, capsys, monkeypatch):
    import_from_lm_eval("lm_eval", monkeypatch)
    assert evaluate(course, "no_such_task") == 2
    error = capsys.readouterr().err
    assert "no task 'no_such_task'" in error and "lm-eval ls tasks" in error
    assert evaluate(course, "ceval-valid_law", "--limit", "2") == 2
    error = capsys.readouterr().err
    assert "could not run ceval-valid_law" in error and "HF_HUB_OFFLINE" in error


def test_without_lm_eval_the_error_names_the_extra(course, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert evaluate(course, "ceval-valid") == 2
    assert '".[evaluation]"' in capsys.readouterr().err
    with pytest.raises(MachineError, match="lm-eval"):
        harness.before_after_tasks(get_profile("glm-4-9b-lora"), course / "adapter", ["ceval-valid"])


def test_a_task_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        harness.before_after_tasks(
            get_profile("glm-4-9b-lora"), tmp_path, ["ceval-valid"], task_folder=tmp_path / "nowhere"
        )


@pytest.mark.slow
def test_a_task_without_accuracy_is_refused_instead_of_an_empty_table(course, capsys, monkeypatch):
    import_from_lm_eval("lm_eval", monkeypatch)
    task = TASK.format(data=course / "tasks" / "questions.json").replace("little_quiz", "little_answers")
    kept = [line for line in task.splitlines() if not line.startswith(("doc_to_choice", "doc_to_target"))]
    text = "\n".join(kept).replace("multiple_choice", "generate_until").replace("metric: acc", "metric: exact_match")
    text += '\ndoc_to_target: "{{answer}}"\ngeneration_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 4\n'
    (course / "tasks" / "little_answers.yaml").write_text(text, encoding="utf-8")
    assert evaluate(course, "little_answers") == 2
    assert "little_answers is not scored by accuracy, but by exact_match" in capsys.readouterr().err
