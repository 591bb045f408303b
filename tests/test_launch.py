"""Training in two processes through `accelerate launch`, as on two GPUs, against one process: DDP, ZeRO-2, ZeRO-3.

accelerate may fall back to another kind of training without a word, so every run's own kind is asserted.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from optional_packages import python_path
from tiny_models import save_model, tiny_glm, tiny_tokenizer

ROOT = Path(__file__).parent.parent
CONFIGS, ON_CPU = ROOT / "configs", ROOT / "tests" / "configs"
KINDS = {"cpu_two_processes": "MULTI_CPU", "cpu_zero2": "DEEPSPEED", "cpu_zero3": "DEEPSPEED"}
BATCH = 8
SETTINGS = (
    "dtype=float32",
    "max_new_tokens=4",
    "training.epochs=2",
    "training.evaluations_per_run=2",
    "lora.dropout=0",
    "training.learning_rate=0.01",
    "training.evaluation_batch_size=8",
)


def rows(count, seed):
    numbers = random.Random(seed)
    made = []
    for index in range(count):
        left, right = numbers.randint(0, 99), numbers.randint(0, 9)
        answer = f"{left}+{right}={left + right}。"
        made.append(
            {
                "id": f"{seed}-{index}",
                "kind": "sum",
                "instruction": f"{left}+{right}等于多少？",
                "input": "",
                "output": answer,
            }
        )
    return made


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course")
    (folder / "data" / "dev").mkdir(parents=True)
    tokenizer = tiny_tokenizer()
    save_model(folder / "weights" / "glm4-nano", tiny_glm(tokenizer, initializer_range=0.02), tokenizer)
    (folder / "data" / "train.json").write_text(json.dumps(rows(48, 1)), encoding="utf-8")
    (folder / "data" / "dev" / "unseen_rows.json").write_text(json.dumps(rows(16, 2)), encoding="utf-8")
    return folder


def command(config, *options, python=sys.executable):
    settings = [part for pair in SETTINGS for part in ("--set", pair)]
    training = ["-m", "glm4_helpers", "train", "--tracking", "disabled", *settings, *options]
    if config is None:
        return [python, *training]
    port = str(random.randint(20_000, 60_000))
    launch = [python, "-m", "accelerate.commands.launch", "--config_file", str(ON_CPU / f"{config}.yaml")]
    return [*launch, "--main_process_port", port, *training]


def train(course, config, *options, environment=None, python=sys.executable):
    """A run's training.json and what it printed; BATCH is rows a step over all processes."""
    processes = 1 if config is None else 2
    output = course / "outputs" / (config or "one")
    size = f"training.per_device_batch_size={BATCH // processes}"
    finished = subprocess.run(
        command(config, "--output", str(output), "--set", size, *options, python=python),
        cwd=ROOT,
        env={**os.environ, "GLM4_HOME": str(course), "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
    record = json.loads((output / "adapter" / "training.json").read_text(encoding="utf-8"))
    return record, finished.stdout


@pytest.fixture(scope="module")
def with_deepspeed(tmp_path_factory):
    """What a run with DeepSpeed gets beside its own options: the Python and the environment.

    DeepSpeed compiles a part of itself with torch's tools, which fail where torch lies in a folder with a space in its
    name: so Python is started through a link. It compiles in a fresh folder: the lock of a killed run would hang it.
    """
    environment = python_path("deepspeed")
    link = tmp_path_factory.mktemp("python") / "venv"
    link.symlink_to(sys.prefix)
    return {
        "python": str(link / "bin" / Path(sys.executable).name),
        "environment": {
            "PYTHONPATH": environment.replace(sys.prefix, str(link)),
            "TORCH_EXTENSIONS_DIR": str(tmp_path_factory.mktemp("extensions")),
            "DS_ACCELERATOR": "cpu",
        },
    }


def losses(record):
    return [
        row.get("loss", row.get("eval_loss")) for row in record["log_history"] if "loss" in row or "eval_loss" in row
    ]


@pytest.fixture(scope="module")
def one_process(course):
    return train(course, None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("config", KINDS)
def test_two_processes_learn_what_one_does(course, one_process, config, request, report):
    record, printed = train(course, config, **(request.getfixturevalue("with_deepspeed") if "zero" in config else {}))
    assert record["distributed_type"] == KINDS[config]
    assert record["facts"]["processes"] == 2
    one, two = losses(one_process), losses(record)
    compared = [f"{first:.6f}  {second:.6f}  {second - first:+.1e}" for first, second in zip(one, two, strict=True)]
    report("Losses of one process, of two, and their difference", "\n".join([f"{KINDS[config]} ({config})", *compared]))
    assert two == pytest.approx(one, abs=1e-3)
    assert one[0] > one[-1], "the run must have learned something, or equal losses say nothing"
    assert printed.count("Result in") == 1, "only the first process may print"


@pytest.mark.slow
def test_the_adapter_of_zero3_is_whole_and_live(course, one_process, with_deepspeed):
    import torch
    from safetensors.torch import load_file

    if not (course / "outputs" / "cpu_zero3" / "adapter").exists():
        train(course, "cpu_zero3", **with_deepspeed)
    one, two = (
        load_file(course / "outputs" / run / "adapter" / "adapter_model.safetensors") for run in ("one", "cpu_zero3")
    )
    assert one.keys() == two.keys()
    for name in one:
        assert two[name].shape == one[name].shape
        assert torch.allclose(two[name].float(), one[name].float(), atol=1e-3), name
    assert all(tensor.any() for name, tensor in two.items() if "lora_B" in name)


@pytest.mark.slow
def test_two_processes_go_on_from_a_checkpoint(course):
    """A finished run made unfinished: its last checkpoint gone and its adapter too, as if it had been killed."""
    whole, _ = train(course, "cpu_two_processes", "--force")
    output = course / "outputs" / "cpu_two_processes"
    shutil.rmtree(output / "adapter")
    checkpoints = sorted((output / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(checkpoints[-1])
    run = json.loads((output / "checkpoints" / "run.json").read_text())
    (output / "checkpoints" / "run.json").write_text(json.dumps({**run, "finished": False}))
    again, _ = train(course, "cpu_two_processes")
    assert again["resumed_from"] == int(checkpoints[0].name.split("-")[1])
    assert losses(again) == pytest.approx(losses(whole), abs=1e-4)


def test_a_checkpoint_of_another_run_is_not_gone_on_from(course, tmp_path):
    output = tmp_path / "out"
    first = train_here(course, output, "--set", "training.seed=1")
    assert first.returncode == 0, first.stderr
    shutil.rmtree(output / "adapter")
    run = json.loads((output / "checkpoints" / "run.json").read_text())
    (output / "checkpoints" / "run.json").write_text(json.dumps({**run, "finished": False}))
    second = train_here(course, output, "--set", "training.seed=2")
    assert second.returncode == 2 and "training.seed was 1 and is 2" in second.stderr
    assert list((output / "checkpoints").glob("checkpoint-*")), "what was trained so far is kept"
    anew = train_here(course, output, "--set", "training.seed=2", "--no-resume")
    assert anew.returncode == 0, anew.stderr


def train_here(course, output, *options):
    return subprocess.run(
        command(None, "--output", str(output), *options),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "GLM4_HOME": str(course), "OMP_NUM_THREADS": "1"},
    )


def test_a_misspelt_key_in_a_yaml_is_refused(course, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("profile: glm4-nano\ntraining:\n  learning_rte: 1e-3\n")
    refused = train_here(course, tmp_path / "out", "--config", str(file))
    assert refused.returncode == 2
    assert "learning_rte" in refused.stderr and "training.learning_rate" in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", sorted([*CONFIGS.glob("*.yaml"), *ON_CPU.glob("*.yaml")]), ids=lambda file: file.name)
def test_every_config_is_one_that_its_reader_takes(file):
    if file.name.startswith("train_"):
        from glm4_helpers.cli.settings import settings_from_yaml
        from glm4_helpers.profiles import get_profile

        assert get_profile(**settings_from_yaml(file))
        return
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(file)).num_processes >= 1


def test_every_config_is_named_where_someone_looks():
    """A file that no page and no command names is one that nobody tries."""
    read = [ROOT / "README.md", *ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("glm4_helpers/**/*.py")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in read)
    assert [file.name for file in CONFIGS.glob("*.yaml") if f"configs/{file.name}" not in text] == []


def test_the_cpu_configs_differ_from_those_for_gpus_in_the_device_only():
    for stage in (2, 3):
        files = (CONFIGS / f"zero{stage}.yaml", ON_CPU / f"cpu_zero{stage}.yaml")
        gpu, cpu = (yaml.safe_load(file.read_text()) for file in files)
        assert gpu["deepspeed_config"] == cpu["deepspeed_config"]
        assert (gpu["use_cpu"], cpu["use_cpu"]) == (False, True)
