"""The doctor: what it finds on this machine, and what it says about machines it is told of."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from glm4_helpers.machine import doctor, hardware, memory, room
from glm4_helpers.machine.hardware import Gpu, Machine
from glm4_helpers.profiles import get_profile, profile_names

LAPTOP = Machine(
    system="Linux 6.1 x86_64",
    python="3.12.1",
    cpu="Some CPU",
    cores=4,
    instructions="AVX2",
    memory_gib=16.0,
    memory_available_gib=9.0,
    disk_free_gib=100.0,
    gpus=(),
    torch="2.13.0",
)
L4 = Gpu("NVIDIA L4", 22.0, bfloat16=True)
T4 = Gpu("Tesla T4", 14.7, bfloat16=False)


def test_this_machine_is_described_in_plain_positive_figures():
    here = hardware.this_machine()
    assert here.cores >= 1
    assert 0 < here.memory_available_gib <= here.memory_gib
    assert here.disk_free_gib > 0
    assert here.torch is not None
    assert f"{here.cores} core" in str(here) and "\n" not in str(here)


def test_the_instructions_are_those_that_torch_uses():
    assert hardware.this_machine().instructions == torch.backends.cpu.get_cpu_capability()


def test_a_container_counts_its_own_limits(monkeypatch):
    limits = {"/sys/fs/cgroup/memory.max": f"{3 * 2**30}\n", "/sys/fs/cgroup/cpu.max": "100000 100000\n"}
    monkeypatch.setattr(hardware, "_text", lambda path: limits.get(path, ""))
    here = hardware.this_machine()
    assert here.memory_gib <= 3.0
    assert here.cores == 1


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_has_needs_and_only_nano_goes_without_a_gpu(name):
    need = room.needs(get_profile(name))
    assert need.memory_gib > 0 and need.disk_gib > 0
    assert (need.gpu_memory_gib == 0) == (name == "glm4-nano")


def test_the_estimates_agree_with_published_figures():
    # zai-org/GLM-4, June 2024: LoRA 21,531 MiB. Unsloth: at least 6.5 GB for QLoRA.
    assert room.needs(get_profile("glm-4-9b-lora")).gpu_memory_gib == pytest.approx(21531 / 1024, rel=0.1)
    assert 6.5 < room.needs(get_profile("glm-4-9b-qlora")).gpu_memory_gib < 12
    # Weights, gradients and AdamW's two states, all in bfloat16, are 8 bytes a weight.
    assert room.needs(get_profile("glm-4-9b-full")).gpu_memory_gib > 9.4e9 * 8 / 2**30


def test_needs_are_the_estimate_of_memory():
    for name in ("glm-4-9b-lora", "glm-4-9b-qlora", "glm-edge-1.5b"):
        profile = get_profile(name)
        estimated = memory.estimate_memory(profile, config=memory.published_shape(profile)).total_gib
        assert room.needs(profile).gpu_memory_gib == pytest.approx(estimated, abs=0.05)


def test_longer_rows_need_more_gpu_memory():
    short, long = (get_profile("glm-4-9b-lora", **{"training.max_length": length}) for length in (256, 2048))
    assert room.needs(short).gpu_memory_gib < room.needs(long).gpu_memory_gib


@pytest.mark.parametrize(
    ("profile", "gpus", "ok", "word"),
    [
        ("glm4-nano", (), True, "none is needed"),
        ("glm-4-9b-lora", (), False, "needed"),
        ("glm-4-9b-lora", (L4,), True, "L4"),
        ("glm-4-9b-qlora", (T4,), False, "computes in bfloat16"),
        ("glm-4-9b-lora", (replace(T4, memory_gib=24.0),), False, "bfloat16"),
        ("glm-4-9b-full", (L4, L4), False, "on each of 2 with ZeRO-3"),
        ("glm-4-9b-full", (replace(L4, memory_gib=79.3),), True, "79 GiB"),
        ("glm-4-9b-full", (replace(L4, memory_gib=47.5),) * 2, False, "on each of 2 with ZeRO-3"),
        ("glm-4-9b-full", (replace(L4, memory_gib=47.5),) * 4, True, "48 GiB"),
        ("glm-4-9b-full", (replace(L4, memory_gib=79.3),) * 2, True, "79 GiB"),
        ("glm-4-9b-lora", (L4, T4), True, "L4"),
        ("glm-4-9b-lora", (T4, L4), False, "computes in bfloat16"),
    ],
)
def test_gpu_check(profile, gpus, ok, word):
    check = doctor._gpu_check(replace(LAPTOP, gpus=gpus), get_profile(profile))
    assert check.ok == ok
    assert word in check.found
    assert bool(check.fix) != ok


def test_fsdp_counts_as_zero_stage_three(monkeypatch):
    assert room.launched_zero_stage() == 0
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    assert room.launched_zero_stage() == 2
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert room.launched_zero_stage() == 3


def test_weights_that_are_here_already_need_no_more_room(tmp_path, monkeypatch):
    monkeypatch.setenv("GLM4_HOME", str(tmp_path))
    profile = get_profile("glm-4-9b-lora")
    (tmp_path / profile.base_model).mkdir(parents=True)
    with (tmp_path / profile.base_model / "model-00001-of-00001.safetensors").open("wb") as file:
        file.truncate(18 * 2**30)
    report = doctor.doctor(profile)
    disk = next(check for check in report.checks if check.name == "disk")
    listed = next(check for check in report.profiles if check.name == profile.name)
    left = f"{room.needs(profile).disk_gib - 18:.0f}"
    assert disk.found.endswith(f"{left} needed") and f"{left} GiB disk" in listed.found


@pytest.mark.parametrize(
    ("line", "ok", "found"),
    [
        ("psutil>=5", True, ""),
        ("psutil>=5000", False, "but >=5000 is needed"),
        ("no-such-package-as-this>=1", False, "not installed"),
    ],
)
def test_package_check_names_the_version_and_the_pip_line(line, ok, found):
    check = doctor._package_check(line)
    assert check.ok == ok and found in check.found
    assert ok or check.fix == f'python -m pip install "{line}"'


def test_a_local_build_of_torch_is_accepted(monkeypatch):
    monkeypatch.setattr(hardware, "package_version", lambda package: "2.13.0+cu126")
    assert doctor._package_check("torch>=2.6").ok


def test_a_profile_adds_the_packages_that_only_it_needs():
    names = [check.name for check in doctor._package_checks(get_profile("glm-4-9b-qlora"))]
    assert "bitsandbytes" in names and "deepspeed" not in names
    assert "bitsandbytes" not in [check.name for check in doctor._package_checks(get_profile())]


def test_outside_the_clone_the_installed_package_tells_its_requirements(monkeypatch):
    lines = ["torch>=2.6", 'bitsandbytes>=0.46; extra == "bitsandbytes"', 'pytest; extra == "test"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    assert doctor._installed_requirements(set()) == ["torch>=2.6"]
    assert doctor._installed_requirements({"bitsandbytes"}) == ["torch>=2.6", "bitsandbytes>=0.46"]


def test_every_failure_comes_with_its_fix(tmp_path, monkeypatch):
    """An empty course folder: model and rows are missing, and for the 9B a GPU and packages too."""
    for name in ("glm4_helpers", "weights"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("GLM4_HOME", str(tmp_path))
    monkeypatch.setattr(hardware, "_gpus", lambda: ())
    for name in ("glm4-nano", "glm-4-9b-lora"):
        report = doctor.doctor(get_profile(name))
        failed = {check.name: check for check in report.checks if not check.ok}
        assert not report.ok
        assert "base model" in failed
        assert all(check.fix for check in failed.values())
        assert all(check.fix in str(report) for check in failed.values())
    assert "download --profile glm-4-9b-lora" in failed["base model"].fix


def test_without_a_course_folder_the_doctor_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv("GLM4_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    failed = {check.name: check.fix for check in doctor.doctor(get_profile("glm4-nano")).checks if not check.ok}
    assert "Clone" in failed["course folder"]


def test_the_report_survives_json():
    report = doctor.doctor(get_profile("glm4-nano"))
    read = json.loads(json.dumps(report.as_dict()))
    assert read["ok"] == report.ok
    assert [check["name"] for check in read["profiles"]] == list(profile_names())
    assert read["machine"]["cores"] == report.machine.cores


def test_a_machine_without_chinese_fonts_is_told_how_to_get_one(monkeypatch, tmp_path):
    from matplotlib import font_manager

    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    monkeypatch.setattr(doctor, "SHIPPED_FONT", tmp_path / "subset.otf")
    check = doctor._font_check()
    assert not check.ok and "fonts-noto-cjk" in check.fix
    (tmp_path / "subset.otf").touch()
    assert doctor._font_check().ok


def test_a_machine_without_matplotlib_is_told_to_install_it():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from glm4_helpers.machine import doctor; print(doctor._font_check().fix)"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert finished.stdout.startswith('python -m pip install "matplotlib'), finished.stderr
