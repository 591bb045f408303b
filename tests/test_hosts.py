"""Hosts with GPUs, imitated: a T4, a V100, cards of 16 and 22 GiB, two cards, a pod's leftovers. The CPU computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from accelerate import PartialState
from cards import CARDS, STARTUP, install
from test_launch import course, rows  # noqa: F401  a course folder with a tiny model
from test_notebooks import execute, printed, small_course  # noqa: F401

from glm4_helpers import models, notebook, training
from glm4_helpers.cli import main as command_line
from glm4_helpers.machine import doctor, gpus, hardware
from glm4_helpers.profiles import get_profile, profile_names
from glm4_helpers.support.errors import MachineError, SettingError

ROOT = Path(__file__).parent.parent
PIP = "python -m pip install torch==2.13.0"
LARGE = [name for name in profile_names() if get_profile(name).shape]


@pytest.fixture
def cards(monkeypatch):
    """Gives this process cards by name, until the test ends."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that what a test makes of it is undone
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    yield lambda *names: install(names, monkeypatch.setattr, monkeypatch.setenv)
    PartialState._reset_state()  # accelerate keeps its device for the whole process


@pytest.fixture
def driver(monkeypatch):
    """Gives the machine a driver of NVIDIA and cards that it names."""

    def give(version, *names):
        capabilities = tuple(float("{}.{}".format(*CARDS[name].capability)) for name in names)
        monkeypatch.setattr(hardware, "nvidia_driver", lambda: (version, capabilities))

    return give


@pytest.fixture
def empty_course(tmp_path, monkeypatch):
    for name in ("glm4_helpers", "weights"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("GLM4_HOME", str(tmp_path))


# The number format


@pytest.mark.parametrize(
    ("card", "dtype", "reason"),
    [
        ("T4", torch.float32, "float32: this GPU (Tesla T4) only emulates bfloat16"),
        ("V100", torch.float32, "float32: this GPU (Tesla V100-SXM2-32GB) only emulates bfloat16"),
        ("A4000", torch.bfloat16, "bfloat16: this GPU (NVIDIA RTX A4000) has bfloat16 in hardware"),
        ("L4", torch.bfloat16, "bfloat16: this GPU (NVIDIA L4) has bfloat16 in hardware"),
        (None, torch.float32, "float32: computed on the CPU"),
    ],
)
def test_the_dtype_follows_a_rule_that_is_said(cards, card, dtype, reason):
    if card:
        cards(card)
    assert models.resolve_dtype("auto") == dtype
    assert models.dtype_reason("auto") == reason
    assert gpus.native_bfloat16() == (dtype == torch.bfloat16)


def test_a_chosen_dtype_stays(cards):
    cards("T4")
    assert models.resolve_dtype("bfloat16") == torch.bfloat16
    assert models.dtype_reason("bfloat16") == "bfloat16: as set"


def test_nano_loads_on_a_t4_in_float32(cards):
    cards("T4")
    assert models.load_base_model(get_profile("glm4-nano")).dtype == torch.float32


@pytest.mark.parametrize(("card", "autocast"), [("T4", False), ("L4", True)])
def test_notebook_01_trains_in_bfloat16_only_where_the_gpu_has_it(cards, card, autocast, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from peft import LoraConfig
    from trl import SFTConfig

    cards(card)
    cells = nbformat.read(ROOT / "notebooks" / "01_environment_setup.ipynb", as_version=4).cells
    source = next(cell.source for cell in cells if "settings = SFTConfig(" in cell.source)
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0))
    names = {"profile": get_profile("glm4-nano"), "model": on_gpu, "EPOCHS": 1, "outputs_dir": lambda name: tmp_path}
    names |= {"LoraConfig": LoraConfig, "SFTConfig": SFTConfig, "native_bfloat16": gpus.native_bfloat16}
    exec(source, names, made := {})
    assert made["settings"].bf16 == autocast


@pytest.mark.parametrize("name", LARGE)
def test_what_a_t4_can_not_do_is_said_before_anything_is_loaded(cards, empty_course, name):
    """The weights are not there, either: nobody is sent to download 18.8 GB for a card that can't use them."""
    cards("T4")
    profile = get_profile(name)
    for attempt in (models.load_base_model, training.train):
        with pytest.raises(MachineError, match="Tesla T4.* only emulates") as raised:
            attempt(profile)
        for word in ("Ampere", "glm4-nano", "glm-edge-1.5b", "65 hours", "estimate"):
            assert word in raised.value.fix


def test_glm_edge_may_be_computed_in_float32_on_a_t4(cards):
    cards("T4")
    models.check_gpu(get_profile("glm-edge-1.5b", dtype="float32"))
    with pytest.raises(MachineError):
        models.check_gpu(get_profile("glm-4-9b-qlora", dtype="float32"))


@pytest.mark.parametrize("card", ["A4000", "L4", "A100"])
def test_cards_with_bfloat16_pass(cards, card):
    cards(card)
    for name in LARGE:
        models.check_gpu(get_profile(name))


def test_a_v100_needs_another_build_of_torch(cards, driver):
    cards("V100")
    driver("580.65.06", "V100")
    with pytest.raises(MachineError, match="without code for this GPU") as raised:
        models.load_base_model(get_profile("glm4-nano"))
    assert raised.value.fix.endswith("https://download.pytorch.org/whl/cu126")


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        (70, "sm_75 sm_80", False),
        (89, "sm_80 sm_86", True),
        (90, "sm_80 sm_86", False),
        (120, "sm_90 compute_90", True),
        (86, "sm_80 sm_90a", True),
        (75, "sm_80", False),
    ],
)
def test_a_build_runs_on_cards_of_its_generation_and_by_ptx_on_later_ones(capability, built, runs):
    assert hardware._in_build(capability, built.split()) == runs


# Several GPUs


def test_of_several_gpus_the_first_visible_one_is_used(cards, monkeypatch, capsys):
    cards("T4", "T4")
    gpus.use_one_gpu()
    assert (os.environ["CUDA_VISIBLE_DEVICES"], torch.cuda.device_count()) == ("0", 1)
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "accelerate launch --config_file configs/ddp.yaml --num_processes 2" in line
    gpus.use_one_gpu()
    assert capsys.readouterr().out == "", "said once"


def test_a_choice_of_gpus_is_narrowed_to_its_first(cards, monkeypatch):
    cards("T4", "T4", "L4", "L4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 3")
    gpus.use_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    assert torch.cuda.get_device_name() == "NVIDIA L4"


def test_one_gpu_and_a_launched_process_stay_as_they_are(cards, monkeypatch, capsys):
    cards("L4")
    gpus.use_one_gpu()
    cards("L4", "L4")
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    gpus.use_one_gpu()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ and capsys.readouterr().out == ""
    assert torch.cuda.device_count() == 2


@pytest.mark.parametrize("ask", ["init", "is_available"])
def test_where_cuda_runs_with_several_already_training_is_refused(cards, ask):
    getattr(cards("T4", "T4"), ask)()
    with pytest.raises(SettingError, match="uses 2 GPUs") as raised:
        training.train(get_profile("glm4-nano"))
    assert "CUDA_VISIBLE_DEVICES=0" in raised.value.fix and "accelerate launch" in raised.value.fix


def test_notebooks_take_one_gpu_before_anything_asks_for_it(cards, monkeypatch, capsys):
    cards("T4", "T4")
    notebook.prepare_notebook()
    assert hardware.this_machine().gpus == (hardware.Gpu("Tesla T4", 14.7, bfloat16=False),)


@pytest.mark.parametrize(
    ("names", "visible", "used", "dtype"),
    [("T4", None, None, "float32"), ("L4,L4", None, "0", "bfloat16"), ("T4,T4,L4,L4", "2,3", "2", "bfloat16")],
)
def test_training_runs_with_a_t4_and_with_several(course, tmp_path, names, visible, used, dtype):  # noqa: F811
    variables = {"GLM4_HOME": str(course), "GLM4_TEST_CARDS": names, "PYTHONPATH": f"{STARTUP}{os.pathsep}{ROOT}"}
    variables |= {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    small = ("training.epochs=1", "training.evaluations_per_run=1", "max_new_tokens=4")
    command = [sys.executable, "-m", "glm4_helpers", "train", "--tracking", "disabled", "--output", tmp_path / "out"]
    done = subprocess.run(
        [*command, *(part for pair in small for part in ("--set", pair))],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (f"(CUDA_VISIBLE_DEVICES={used})" in done.stdout) == (used is not None)
    run = json.loads((tmp_path / "out" / "checkpoints" / "run.json").read_text(encoding="utf-8"))
    assert run["facts"]["profile"]["dtype"] == dtype


# What a pod leaves in the environment


@pytest.mark.parametrize(
    "left", [{"RANK": "1"}, {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "pod-0"}, {"LOCAL_RANK": "1"}]
)
def test_leftovers_of_a_pod_silence_no_command(monkeypatch, capsys, left):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert command_line.main(["memory", "--profile", "glm-4-9b-lora"]) == 0
    told = capsys.readouterr()
    assert "GiB" in told.out
    assert "no launcher started this process" in told.err
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(os.environ)


def test_a_leftover_rank_does_not_choose_the_gpu(cards, monkeypatch):
    chosen = gpus.default_device
    cards("L4", "L4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert chosen() == torch.device("cuda", 0)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert chosen() == torch.device("cuda", 1)


# The doctor


def found(name, check="GPU"):
    report = doctor.doctor(get_profile(name))
    return next(line for line in report.checks if line.name == check)


def test_the_doctor_says_of_a_t4_what_loading_says(cards):
    cards("T4")
    assert found("glm4-nano").ok and found("glm4-nano").found == "Tesla T4 (15 GiB); bfloat16 only emulated"
    for name in LARGE:
        assert not found(name).ok and found(name).fix == gpus.BFLOAT16_FIX


@pytest.mark.parametrize(("card", "fits"), [("A4000", "glm-4-9b-qlora"), ("L4", "glm-4-9b-lora")])
def test_the_doctor_finds_room_on_cards_with_bfloat16(cards, card, fits):
    cards(card)
    assert found(fits).ok and "bfloat16 in hardware" in found(fits).found
    assert found("glm-4-9b-lora").ok == (card == "L4")


def test_the_doctor_says_how_several_gpus_are_used(cards):
    cards("L4", "L4")
    assert "use the first, `accelerate launch` uses all" in found("glm-4-9b-lora").found


def test_the_doctor_names_the_better_one_of_two_gpus(cards):
    cards("T4", "L4")
    check = found("glm-4-9b-lora")
    assert not check.ok and check.fix == "Choose NVIDIA L4: set CUDA_VISIBLE_DEVICES=1."


def test_the_doctor_finds_a_v100_left_out_of_the_build(cards, driver):
    cards("V100")
    driver("580.65.06", "V100")
    check = found("glm4-nano", "driver")
    assert not check.ok and "+cu126 --index-url" in check.fix and "CUDA 13.0" in check.found


@pytest.mark.parametrize(
    ("version", "card", "fix"),
    [
        ("580.65.06", "L4", f"{PIP}+cu130 --index-url https://download.pytorch.org/whl/cu130"),
        ("550.127.05", "L4", f"{PIP}+cu126 --index-url https://download.pytorch.org/whl/cu126"),
        ("470.256.02", "L4", "Update NVIDIA's driver 470.256.02 to 580 or newer"),
    ],
)
def test_a_torch_that_can_not_use_the_driver_gets_one_line(driver, monkeypatch, version, card, fix):
    """A CPU build beside a GPU, or a build for a newer driver: torch then sees no GPU."""
    monkeypatch.setattr(hardware, "_gpus", lambda: ())
    driver(version, card)
    assert found("glm-4-9b-lora", "driver").fix.startswith(fix)
    assert found("glm-4-9b-lora").fix.startswith(fix)
    nano = found("glm4-nano", "driver")
    assert nano.ok and fix in nano.found


def test_a_cpu_build_beside_a_gpu_is_refused_for_what_needs_the_gpu(driver, empty_course, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver("580.65.06", "L4")
    for attempt in (models.load_base_model, training.train):
        with pytest.raises(MachineError, match=r"NVIDIA GPU, and torch .* can't use it") as raised:
            attempt(get_profile("glm-4-9b-qlora"))
        assert raised.value.fix.startswith("python -m pip install torch==2.13.0+cu130 --index-url")
    models.check_gpu(get_profile("glm4-nano"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    models.check_gpu(get_profile("glm-4-9b-qlora"))


def test_the_doctor_names_the_index_that_fits_where_all_is_well(cards, driver):
    cards("L4")
    driver("580.65.06", "L4")
    check = found("glm-4-9b-lora", "driver")
    assert check.ok and "NVIDIA 580.65.06 (index for torch 2.13.0: cu130)" in check.found


@pytest.mark.parametrize(
    ("version", "capabilities", "index"),
    [
        ("580.65.06", (7.5,), "cu130"),
        ("580.65.06", (7.0,), "cu126"),
        ("575.57.08", (8.9,), "cu126"),
        ("525.60.13", (7.5,), "cu126"),
        ("575.57.08", (12.0,), None),
        ("470.1", (8.0,), None),
        ("590.1", (), "cu130"),
    ],
)
def test_the_index_fits_driver_and_cards(version, capabilities, index):
    assert gpus.torch_index(version, capabilities) == index


def test_the_pip_line_has_the_pinned_torch():
    assert f"torch=={gpus.TORCH}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("told", "kernel", "expected"),
    [
        ("550.54.15, 7.5\n550.54.15, 8.9\n", "", ("550.54.15", (7.5, 8.9))),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", "", (None, ())),
        ("", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19", ("535.129.03", ())),
        ("", "", (None, ())),
    ],
)
def test_the_driver_is_read_from_its_tool_or_from_the_kernel(monkeypatch, told, kernel, expected):
    monkeypatch.setattr(hardware, "_output_of", lambda *command: told)
    monkeypatch.setattr(hardware, "_text", lambda path: kernel)
    assert hardware.nvidia_driver() == expected


def test_jupyter_is_allowed_to_run_as_root_only_for_root(tmp_path):
    tool = tmp_path / "id"
    for user in ("0", "1000"):
        tool.write_text(f"#!/bin/sh\necho {user}\n")
        tool.chmod(0o755)
        path = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        printed_lines = subprocess.run(["make", "-n", "lab"], cwd=ROOT, env=path, capture_output=True, text=True).stdout
        assert ("--allow-root" in printed_lines) == (user == "0")


# Notebooks


@pytest.fixture(scope="module")
def shared_course(small_course):  # noqa: F811
    """One course folder for each set of cards, so that notebook 06 finds what 04 trained."""
    made = {}
    return lambda names: made.setdefault(names, small_course(names.replace(",", "-")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["01_environment_setup", "04_lora_sft_training", "06_before_after_comparison"])
@pytest.mark.parametrize("names", ["T4", "T4,T4"])
def test_notebooks_run_unchanged_with_a_t4_and_with_two(shared_course, names, name, monkeypatch):
    monkeypatch.setenv("GLM4_TEST_CARDS", names)
    monkeypatch.setenv("PYTHONPATH", f"{STARTUP}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook, metrics = execute(shared_course(names), name, monkeypatch)
    assert metrics and "Tesla T4 (15 GiB)" in printed(notebook)
    assert ("this process uses one (CUDA_VISIBLE_DEVICES=0)" in printed(notebook)) == (names == "T4,T4")
