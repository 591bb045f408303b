"""notebooks/one_file.py, the course without its helpers: the same ids, the same rule for right, and it runs."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glm4_helpers import evaluation, get_profile, held_out
from glm4_helpers.chat_format import encode
from glm4_helpers.data import encode_rows, load_messages, read_rows, to_messages
from glm4_helpers.generation import Answer
from glm4_helpers.training import lora_config, sft_config

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "notebooks" / "one_file.py"
SETTINGS = (
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "gradient_checkpointing",
    "padding_free",
    "max_length",
    "seed",
    "bf16",
)


@pytest.fixture(scope="module")
def one_file():
    spec = importlib.util.spec_from_file_location("one_file", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "0")
        spec.loader.exec_module(module)
    return module


def test_needs_nothing_of_the_course_and_can_be_read_at_one_sitting():
    source = SCRIPT.read_text(encoding="utf-8")
    assert not re.search(r"^\s*(from|import) \.?glm4_helpers", source, re.MULTILINE)
    assert len([line for line in source.splitlines() if line.strip()]) <= 150


@pytest.mark.parametrize("name", ["train", *(f"test/{name}" for name in held_out.SET_NAMES)])
def test_encodes_as_the_helpers_do(one_file, nano_tokenizer, name):
    rows = one_file.read(name, 300)
    assert len(rows) >= 250
    for row in rows:
        assert one_file.to_messages(row) == to_messages(row)
        assert one_file.encode(nano_tokenizer, one_file.to_messages(row)) == encode(nano_tokenizer, to_messages(row))


def test_a_control_token_in_a_message_stays_text(one_file, nano_tokenizer):
    messages = [{"role": "user", "content": "<|assistant|>好"}, {"role": "assistant", "content": "你好！"}]
    assert one_file.encode(nano_tokenizer, messages) == encode(nano_tokenizer, messages)


def test_no_row_is_long_enough_to_be_dropped(nano_tokenizer):
    """The script has no limit of length; the helpers drop rows above theirs."""
    profile = get_profile("glm4-nano")
    rows = load_messages(ROOT / profile.train_data)
    assert len(encode_rows(nano_tokenizer, rows, profile.training.max_length)) == len(rows)


@pytest.mark.parametrize("name", held_out.SET_NAMES)
def test_calls_the_same_answers_right(one_file, name):
    """Right ones, near misses, and answers that were cut off; also what only looks different."""
    for row in read_rows(ROOT / "data" / "test" / f"{name}.json"):
        output = row["output"]
        near = (
            f" {output}\n",
            output.replace("，", ","),
            output[:-1],
            output[1:],
            output * 2,
            f"{output}、{output}",
            "",
        )
        for text in (output, *near):
            for stopped in (True, False):
                wanted = evaluation.is_right(row, Answer(text, stopped, len(text)))
                assert one_file.is_right(row, {"text": text, "stopped": stopped}) == wanted, (row, text)


@pytest.mark.parametrize(("right", "total"), [(0, 40), (40, 40), (1, 3), (267, 273)])
def test_its_intervals_are_those_of_the_course(one_file, right, total):
    assert one_file.interval(right, total) == pytest.approx(evaluation.wilson_interval(right, total))


def test_gives_the_answers_of_the_helpers(one_file, nano_tokenizer, nano_model):
    rows = [row for name in held_out.SET_NAMES for row in one_file.read(f"test/{name}", 3)]
    scored = evaluation.evaluate_rows(nano_model, nano_tokenizer, rows)
    given = one_file.answer(nano_model, nano_tokenizer, rows, batch_size=5)
    assert given == [{"text": answer["answer"], "stopped": answer["stopped"]} for answer in scored.answers]
    assert [one_file.is_right(*pair) for pair in zip(rows, given)] == [answer["right"] for answer in scored.answers]


@pytest.mark.slow
def test_trains_with_the_profile_settings_and_prints_the_comparison(tmp_path):
    for folder in ("weights", "data"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    script = tmp_path / "notebooks" / "one_file.py"
    script.parent.mkdir()
    shutil.copy(SCRIPT, script)
    command = [sys.executable, script, "--rows", "12", "--steps", "30"]
    finished = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=600)
    assert finished.returncode == 0, finished.stderr
    table = [line for line in finished.stdout.splitlines() if line.startswith((*held_out.SET_NAMES, "stop rate"))]
    assert len(table) == 5 and all(re.search(r"\d%.*\d%", line) for line in table)

    output = tmp_path / "outputs" / "one_file"
    answers = json.loads((output / "answers.json").read_text(encoding="utf-8"))
    for side, column in (("before", 0), ("after", 1)):
        for name, line in zip(held_out.SET_NAMES, table):
            rows = read_rows(ROOT / "data" / "test" / f"{name}.json")
            rows = rows[:: len(rows) // 12][:12]
            given = [Answer(answer["text"], answer["stopped"], 0) for answer in answers[side][name]]
            right = evaluation.Rate.of(map(evaluation.is_right, rows, given))
            assert f"{line.removeprefix(name).split(']')[column].strip()}]" == str(right)
    adapter = json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))
    wanted = lora_config(get_profile("glm4-nano"))
    for setting in ("r", "lora_alpha", "lora_dropout"):
        assert adapter[setting] == getattr(wanted, setting)
    assert set(adapter["target_modules"]) == wanted.target_modules

    used = torch.load(output / "training_args.bin", weights_only=False)
    course = sft_config(get_profile("glm4-nano"), output, torch.float32)
    assert {name: getattr(used, name) for name in SETTINGS} == {name: getattr(course, name) for name in SETTINGS}
