"""What this machine is, which of its GPUs a process uses, and whether it is enough for a profile: the doctor.

Nothing is installed or downloaded. How much memory a profile takes is worked out in memory.py.
Light to import; torch is imported when the GPU is asked for.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import memory
from .errors import CourseError, MachineError, SettingError
from .paths import CHECKPOINTS, home
from .profiles import Needs, Profile, get_profile, profile_names

GIB = 2**30

TORCH = "2.13.0"
"""The version in constraints.txt."""

BFLOAT16_FIX = (
    "Take an NVIDIA GPU of Ampere or newer (RTX 30 series, A10, L4, A100 and later). This one trains glm4-nano, and "
    "GLM-Edge in float32: --profile glm-edge-1.5b --set dtype=float32. In float32 the 9B's recipe would take about "
    "65 hours on a T4 with QLoRA (an estimate), so it is not offered."
)
"""What to do on a GPU that only emulates bfloat16. The hours are arithmetic from the T4's published speed."""

_LAUNCHED = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR")
"""Variables that `accelerate launch` and torchrun set in each process they start."""

CHINESE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei", "Heiti SC", "PingFang HK", "Heiti TC", "STHeiti", "Songti SC",
    "SimSun", "Arial Unicode MS", "Noto Sans CJK JP",
)  # fmt: skip
"""Families with Chinese glyphs on Linux, macOS and Windows, in the order they are preferred; plots use the first one
installed."""


@dataclass(frozen=True)
class Gpu:
    """A GPU of NVIDIA or AMD as torch sees it, memory in GiB. Apple's are left out: training does not use them.

    ``bfloat16`` is whether it has bfloat16 in hardware, ``in_build`` whether this torch was built with code for it.
    """

    name: str
    memory_gib: float
    bfloat16: bool
    in_build: bool = True


@dataclass(frozen=True)
class Machine:
    """What the course may use here. Memory and disk in GiB; a container's limits count, not its host's size.

    ``instructions`` are the widest vector instructions that torch uses on this CPU. ``driver`` is the version of
    NVIDIA's driver, which may be there although torch can't use it and ``gpus`` is empty.
    """

    system: str
    python: str
    cpu: str
    cores: int
    instructions: str
    memory_gib: float
    memory_available_gib: float
    disk_free_gib: float
    gpus: tuple[Gpu, ...]
    torch: str | None
    driver: str | None = None

    @property
    def gpu(self) -> Gpu | None:
        """The GPU with the most memory, or None."""
        return max(self.gpus, key=lambda gpu: gpu.memory_gib, default=None)

    def __str__(self) -> str:
        """One line for the top of a notebook."""
        gpu = _gpu_text(self.gpus) if self.gpus else "no GPU"
        return f"{self.cpu}, {_count(self.cores, 'core')}, {self.memory_gib:.0f} GiB memory, {gpu}, torch {self.torch}"


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table. ``fix`` says what to do and is empty where ``ok``."""

    name: str
    ok: bool
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Report:
    """The doctor's findings. ``ok`` is about ``profile``; ``profiles`` says which of the others would run here."""

    profile: str
    machine: Machine
    checks: tuple[Check, ...]
    profiles: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check for the chosen profile passed."""
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        return format_report(self)

    def as_dict(self) -> dict[str, Any]:
        """The same as a dict that JSON can hold."""
        return {"ok": self.ok, **dataclasses.asdict(self)}


def machine(folder: Path | None = None) -> Machine:
    """This machine; disk space is that of ``folder`` (default: the working folder)."""
    import psutil

    ram = psutil.virtual_memory()
    limit = _container_memory_limit() or ram.total
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        cpu=_cpu_name(),
        cores=_cores(),
        instructions=_instructions(),
        memory_gib=round(min(limit, ram.total) / GIB, 1),
        memory_available_gib=round(min(limit, ram.available) / GIB, 1),
        disk_free_gib=round(shutil.disk_usage(folder or Path.cwd()).free / GIB, 1),
        gpus=_gpus(),
        torch=_version("torch"),
        driver=_nvidia()[0],
    )


def launched() -> bool:
    """Whether a launcher started this process as one of several. A pod's leftover RANK alone does not count."""
    return all(name in os.environ for name in _LAUNCHED)


def ignore_leftovers() -> None:
    """Remove LOCAL_RANK, RANK and WORLD_SIZE where no launcher set them: accelerate would wait for other processes."""
    left = [name for name in _LAUNCHED[:3] if name in os.environ]
    if left and not launched():
        for name in left:
            del os.environ[name]
        print(f"Ignored {', '.join(left)} in the environment: no launcher started this process.", file=sys.stderr)


def use_one_gpu() -> None:
    """Of several visible GPUs leave this process the first, and say in one line how to use all.

    TRL's trainer takes several GPUs only with a process for each. To be called before CUDA starts; a process that a
    launcher started keeps all it sees. Raises SettingError where CUDA has already started with several.
    """
    import torch

    ignore_leftovers()
    count = torch.cuda.device_count()
    if launched() or count < 2:
        return
    every = f"accelerate launch --config_file configs/ddp.yaml --num_processes {count} -m glm4_helpers train"
    variable = "CUDA_VISIBLE_DEVICES"
    if torch.version.hip and "HIP_VISIBLE_DEVICES" in os.environ:
        variable = "HIP_VISIBLE_DEVICES"
    first = os.environ.get(variable, "0").partition(",")[0].strip()
    if not torch.cuda.is_initialized():
        os.environ[variable] = first
        torch.cuda.init()  # from here on the count is the driver's own, which may have read the variable earlier
    if torch.cuda.device_count() > 1:
        raise SettingError(
            f"This process already uses {count} GPUs, and training takes one for each process.",
            f"Restart it (in a notebook: the kernel) with {variable}={first} in its environment; or use all: {every}",
        )
    print(f"{count} GPUs are visible; this process uses one ({variable}={first}). All of them: {every}", flush=True)


def needs(profile: Profile) -> Needs:
    """Estimated needs for training with ``profile``.

    GPU memory is what ``memory.estimate`` gives for the profile's own setting on one GPU; for full fine-tuning, for two
    GPUs that share it with ZeRO-3, both together. Disk space is for the download, with a fifth to spare, and the
    checkpoints that ``train`` asks room for.
    """
    if profile.needs is not None:
        return profile.needs
    shape = memory.published_shape(profile)
    sharing = {"gpus": 1} if profile.lora else {"gpus": 2, "zero_stage": 3}
    each = memory.estimate(profile, memory.setting_of(profile, **sharing), shape).total_gib
    weights = shape.parameters * 2 / GIB
    return Needs(
        memory_gib=8,
        gpu_memory_gib=round(each * sharing["gpus"], 1),
        disk_gib=round(weights * 1.2 + _checkpoint_gib(profile, shape, sharing.get("zero_stage", 0)) + 1),
    )


def require_room(
    profile: Profile, folder: Path, lengths: Sequence[int], processes: int = 1, zero_stage: int = 0
) -> None:
    """Raise MachineError, with the numbers and the nearest setting that fits, where a training can't have its memory
    or its disk space. ``lengths`` are those of all rows in tokens; ``folder`` is where checkpoints go."""
    from .models import default_device, model_config

    on_gpu = default_device().type == "cuda"
    here = machine(next(parent for parent in (folder, *folder.parents) if parent.exists()))
    shape = memory.shape_of(model_config(profile))
    disk = _checkpoint_gib(profile, shape, zero_stage)
    # Those of an interrupted run make room as new ones come.
    there = sum(file.stat().st_size for file in (folder / CHECKPOINTS).rglob("*") if file.is_file()) / GIB
    if disk > here.disk_free_gib + there:
        raise MachineError(
            f"The checkpoints of {profile.name} need about {disk:.1f} GiB; {here.disk_free_gib:.1f} GiB are free for {folder}.",
            "Free some space, give another folder (--output), or lower training.evaluations_per_run.",
        )
    setting = memory.setting_of(
        profile, length=max(lengths), lengths=tuple(lengths), gpus=processes, zero_stage=zero_stage,
        triton=importlib.util.find_spec("triton") is not None, device="gpu" if on_gpu else "cpu",
    )  # fmt: skip
    memory.require_memory(profile, _free_gib() if on_gpu else here.memory_available_gib / processes, setting, shape)


def launched_zero_stage() -> int:
    """The ZeRO stage that `accelerate launch` started this process with; FSDP, which divides all of it too, counts as 3."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return 3
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0"))


def _checkpoint_gib(profile: Profile, shape: memory.Shape, zero_stage: int) -> float:
    """Checkpoints and the result: trained weights with AdamW's two states; LoRA keeps every checkpoint, in float32.

    In full fine-tuning two stay, and a third is there until the oldest is gone. DeepSpeed saves its states and its copy of
    the weights in float32: 14 bytes a weight instead of 6 (runtime/zero/, stages 1 to 3).
    """
    if profile.lora:
        return memory.lora_parameters(shape, profile) * 4 * 3 * (profile.training.evaluations_per_run + 1) / GIB
    return shape.parameters * (3 * (14 if zero_stage else 6) + 2) / GIB


def _free_gib() -> float:
    import torch

    return torch.cuda.mem_get_info()[0] / GIB


def doctor(profile: Profile | None = None) -> Report:
    """Checks whether this machine, its packages and its files are enough for ``profile``."""
    profile = profile or get_profile()
    here = machine(_course_folder())
    checks = [
        _python_check(),
        *_package_checks(profile),
        Check("CPU", True, f"{here.cpu}, {_count(here.cores, 'core')}, {here.instructions}"),
        _gpu_check(here, profile),
        *_driver_check(here, profile),
        _size_check("memory", here.memory_gib, needs(profile).memory_gib, _MORE_MEMORY),
        _size_check("disk", here.disk_free_gib, needs(profile).disk_gib - _downloaded_gib(profile), _MORE_DISK),
        _font_check(),
        _course_check(),
        *_file_checks(profile),
    ]
    return Report(profile.name, here, tuple(checks), tuple(_profile_check(here, name) for name in profile_names()))


def format_report(report: Report) -> str:
    """The report as a plain table, each FAIL followed by its fix."""
    width = max(len(check.name) for check in (*report.checks, *report.profiles))
    lines = [f"Is this machine enough for {report.profile}?", ""]
    for check in report.checks:
        lines.append(f"{'OK  ' if check.ok else 'FAIL'}  {check.name:<{width}}  {check.found}")
        lines += [] if check.ok else [f"      {'':<{width}}  Fix: {check.fix}"]
    lines += ["", "Profiles that could be trained on this machine (memory and disk are estimates):"]
    for check in report.profiles:
        lines.append(f"{'yes ' if check.ok else 'no  '}  {check.name:<{width}}  {check.found}")
    failed = sum(not check.ok for check in report.checks)
    verdict = "All checks passed." if report.ok else f"{_count(failed, 'check')} failed."
    return "\n".join([*lines, "", verdict])


_MORE_MEMORY = "Close other programs, take a machine with more memory, or choose a smaller profile with --profile."
_MORE_DISK = "Free some space, or clone the course onto a larger disk."


# --- packages -------------------------------------------------------------------------------------------------------


def _python_check() -> Check:
    return Check(
        "Python",
        sys.version_info >= (3, 11),
        platform.python_version(),
        "" if sys.version_info >= (3, 11) else "Install Python 3.11 or newer and make a new environment with it.",
    )


def _package_checks(profile: Profile) -> list[Check]:
    """One check for each requirement of the course, and for those that only this profile has."""
    extras = set()
    if profile.quantization:
        extras.add("bitsandbytes")
    if profile.lora is None:
        extras.add("deepspeed")
    return [_package_check(line) for line in requirements(extras)]


def requirements(extras: set[str] = frozenset()) -> list[str]:
    """What the course requires, as pip writes it: from pyproject.toml in the clone, else from the installed package."""
    pyproject = Path(__file__).parent.parent / "pyproject.toml"
    if pyproject.is_file():
        import tomllib

        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        optional = project["optional-dependencies"]
        return [*project["dependencies"], *(line for extra in sorted(extras) for line in optional[extra])]
    return _installed_requirements(extras)


def _installed_requirements(extras: set[str]) -> list[str]:
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("glm4-helpers") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    wanted = []
    for line in lines:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            requirement.marker = None
            wanted.append(str(requirement))
    return wanted


def _package_check(line: str) -> Check:
    from packaging.requirements import Requirement

    requirement = Requirement(line)
    version = _version(requirement.name)
    fix = f'python -m pip install "{line}"'
    if version is None:
        return Check(requirement.name, False, "not installed", fix)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(requirement.name, False, f"{version}, but {requirement.specifier} is needed", fix)
    return Check(requirement.name, True, version)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- what a profile needs -------------------------------------------------------------------------------------------


def _profile_check(here: Machine, name: str) -> Check:
    """Whether the hardware is enough; packages and files can be fetched and are left out."""
    profile = get_profile(name)
    need = needs(profile)
    disk_gib = need.disk_gib - _downloaded_gib(profile)
    wanted = f"{need.memory_gib:.0f} GiB memory, {disk_gib:.0f} GiB disk"
    if need.gpu_memory_gib:
        where = "one GPU" if profile.lora else "all GPUs together"
        wanted += f", {need.gpu_memory_gib:.0f} GiB on {where} with bfloat16"
    ok = _gpu_check(here, profile).ok and here.memory_gib >= need.memory_gib and here.disk_free_gib >= disk_gib
    return Check(name, ok, f"needs {wanted}", "" if ok else "Take a larger machine, or a smaller profile.")


def _gpu_check(here: Machine, profile: Profile) -> Check:
    need = needs(profile).gpu_memory_gib
    texts = [_gpu_text(here.gpus), *map(_bfloat16_text, here.gpus[:1]), _several_text(here.gpus)]
    found = "; ".join(filter(None, texts))
    if not need:
        return Check("GPU", True, found or "none, and none is needed")
    if not here.gpus:
        fix = "Take a machine with a GPU of NVIDIA or AMD (Colab, Kaggle, rented), or glm4-nano, which needs none."
        found = f"none that training can use; {need:.0f} GiB needed"
        return Check("GPU", False, found, torch_fix() if here.driver else fix)
    problem, fix = _gpu_problem(here.gpus[:1] if profile.lora else here.gpus, profile, need)
    better = [index for index, gpu in enumerate(here.gpus) if not _gpu_problem((gpu,), profile, need)[0]]
    if problem and better and profile.lora:
        fix = f"Choose {here.gpus[better[0]].name}: set CUDA_VISIBLE_DEVICES={better[0]}."
    return Check("GPU", not problem, f"{found}; {problem}" if problem else found, fix)


def _gpu_problem(gpus: tuple[Gpu, ...], profile: Profile, need: float) -> tuple[str, str]:
    """What keeps the profile from these GPUs together, and the fix; both empty where nothing does."""
    if not all(gpu.bfloat16 for gpu in gpus) and (profile.dtype == "bfloat16" or profile.quantization):
        return f"{profile.name} computes in bfloat16", BFLOAT16_FIX
    if sum(gpu.memory_gib for gpu in gpus) < need:
        fix = "Take a larger GPU, or a smaller profile with --profile; training.max_length also lowers the need."
        return f"{need:.0f} GiB needed", fix
    return "", ""


def _bfloat16_text(gpu: Gpu) -> str:
    return "bfloat16 in hardware" if gpu.bfloat16 else "bfloat16 only emulated"


def _several_text(gpus: tuple[Gpu, ...]) -> str:
    if len(gpus) < 2:
        return ""
    return "notebooks and `train` use the first, `accelerate launch` uses all (configs/ddp.yaml)"


def _driver_check(here: Machine, profile: Profile) -> list[Check]:
    """What NVIDIA's driver and torch's build make of each other; no check without such a driver."""
    if here.driver is None:
        return []
    index = torch_index(*_nvidia()) or "none, the driver is too old"
    found = f"NVIDIA {here.driver} (index for torch {TORCH}: {index}), torch {here.torch} {_torch_build()}"
    unused = not here.gpus or not all(gpu.in_build for gpu in here.gpus)
    if unused and (here.gpus or needs(profile).gpu_memory_gib):
        return [Check("driver", False, f"{found}, which can't use the GPU", torch_fix())]
    return [Check("driver", True, f"{found}, which can't use the GPU; to use it: {torch_fix()}" if unused else found)]


def _torch_build() -> str:
    try:
        import torch
    except (ImportError, OSError):
        return "(not there)"
    return f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU"


def unused_nvidia_gpu() -> bool:
    """Whether NVIDIA's driver names a GPU that torch doesn't see, without being told not to."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    return not hidden and not torch.cuda.is_available() and bool(_nvidia()[1])


def torch_index(driver: str, capabilities: tuple[float, ...] = ()) -> str | None:
    """The index of torch 2.13's builds that fits driver and cards; None where the driver is too old for both.

    cu130 takes cards from Turing (7.5) on and needs driver 580, cu126 takes those before Blackwell (10.0) and runs from
    525 on. Sources: NVIDIA's table of CUDA's minor version compatibility, PyTorch's RELEASE.md.
    """
    number = int(driver.partition(".")[0])
    if number >= 580 and min(capabilities, default=7.5) >= 7.5:
        return "cu130"
    return "cu126" if number >= 525 and max(capabilities, default=0.0) < 10 else None


def torch_fix() -> str:
    """The pip line for the torch that can use NVIDIA's driver and cards here."""
    driver, capabilities = _nvidia()
    index = torch_index(driver, capabilities) if driver else "cu130"
    if index is None:
        return f"Update NVIDIA's driver {driver} to 580 or newer: torch {TORCH} has no build for it and these cards."
    return f"python -m pip install torch=={TORCH}+{index} --index-url https://download.pytorch.org/whl/{index}"


def _size_check(name: str, found: float, needed: float, fix: str) -> Check:
    ok = found >= needed
    size = f"{found:.1f} GiB{' free' if name == 'disk' else ''}"
    return Check(name, ok, f"{size}, {needed:.0f} needed", "" if ok else fix)


# --- files ----------------------------------------------------------------------------------------------------------


def _downloaded_gib(profile: Profile) -> float:
    """The part of the base model's weights that is here already."""
    folder = _course_folder()
    files = (folder / profile.base_model).glob("*.safetensors") if folder else ()
    return sum(file.stat().st_size for file in files) / GIB


def _course_folder() -> Path | None:
    try:
        return home()
    except CourseError:
        return None


def _course_check() -> Check:
    try:
        folder = home()
    except CourseError as error:
        return Check("course folder", False, error.problem, error.fix)
    outputs = folder / "outputs"
    if not os.access(outputs if outputs.exists() else folder, os.W_OK):
        return Check("course folder", False, f"{outputs} can't be written", "Make it writable, or clone elsewhere.")
    return Check("course folder", True, str(folder))


def _file_checks(profile: Profile) -> list[Check]:
    """Whether the base model and the rows are there; no check where the course folder itself is missing."""
    folder = _course_folder()
    if folder is None:
        return []
    model = folder / profile.base_model
    complete = (model / "config.json").is_file() and any(model.glob("*.safetensors"))
    checks = [_file_check("base model", complete, profile.base_model, profile)]
    train = [profile.train_data] if isinstance(profile.train_data, str) else profile.train_data
    for name, path in (*(("train rows", path) for path in train), ("test rows", profile.test_data)):
        # A hub id such as owner/name is no file of the course, and there is none to look for.
        if path is not None and path.startswith("data/"):
            checks.append(_file_check(name, (folder / path).exists(), path, profile))
    return checks


def _file_check(name: str, present: bool, path: str, profile: Profile) -> Check:
    if present:
        return Check(name, True, path)
    shipped = profile.hub_id is None or path.startswith("data/")
    fix = (
        f"It comes with the course: git checkout -- {path}"
        if shipped
        else f"python -m glm4_helpers download --profile {profile.name}"
    )
    return Check(name, False, f"{path} is missing or incomplete", fix)


def _font_check() -> Check:
    try:
        from matplotlib import font_manager
    except ImportError:
        return Check("Chinese font", False, "matplotlib can't be imported", 'python -m pip install "matplotlib>=3.8"')
    installed = {font.name for font in font_manager.fontManager.ttflist}
    for family in CHINESE_FONTS:
        if family in installed:
            return Check("Chinese font", True, family)
    if any((Path(__file__).parent / "fonts").glob("*.[ot]tf")):
        return Check("Chinese font", True, "none installed; plots use the one that comes with the course")
    fix = "Install one (Debian, Ubuntu: sudo apt install fonts-noto-cjk), then run this again."
    return Check("Chinese font", False, "none that matplotlib knows", fix)


# --- hardware -------------------------------------------------------------------------------------------------------


def _gpus() -> tuple[Gpu, ...]:
    """The GPUs that training can use; empty without torch or without a GPU."""
    try:
        import torch
    except (ImportError, OSError):
        return ()
    if torch.cuda.is_available():
        return tuple(cuda_gpu(index) for index in range(torch.cuda.device_count()))
    return ()


def cuda_gpu(index: int) -> Gpu:
    """The GPU with this number among those visible to torch."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    # Capability 8.0 is Ampere, the first with bfloat16 in hardware; on ROCm the numbers mean something else.
    amd = bool(torch.version.hip)
    return Gpu(
        properties.name,
        round(properties.total_memory / GIB, 1),
        amd or properties.major >= 8,
        amd or _in_build(10 * properties.major + properties.minor, torch.cuda.get_arch_list()),
    )


def _in_build(capability: int, built: list[str]) -> bool:
    """Whether a build has code for a card: sm_86 also runs on 8.9, compute_90 (PTX) on all that came later."""
    for kind, number in re.findall(r"(sm|compute)_(\d+)", " ".join(built)):
        same = kind == "compute" or int(number) // 10 == capability // 10
        if same and int(number) <= capability:
            return True
    return False


def _nvidia() -> tuple[str | None, tuple[float, ...]]:
    """The version of NVIDIA's driver, or None, and the compute capability of each card where the driver tells."""
    told = _output_of("nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader")
    rows = re.findall(r"^([\d.]+), ([\d.]+)$", told, re.MULTILINE)
    if rows:
        return rows[0][0], tuple(float(capability) for _, capability in rows)
    version = re.search(r"\d{3,}\.[\d.]+", _text("/proc/driver/nvidia/version"))
    return version and version[0], ()


def _cpu_name() -> str:
    if sys.platform == "darwin":
        return _output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return _cpuinfo("model name") or platform.processor() or platform.machine() or "unknown CPU"


def _instructions() -> str:
    try:
        import torch
    except (ImportError, OSError):
        return "instructions unknown"
    return torch.backends.cpu.get_cpu_capability()


def _cpuinfo(key: str) -> str:
    """The first value of ``key`` in /proc/cpuinfo, or an empty string."""
    for line in _text("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _cores() -> int:
    """Cores that this process may use: affinity and a container's share count."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _text("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    if quota.isdigit() and period.isdigit():
        return max(1, min(available, math.ceil(int(quota) / int(period))))
    return available


def _container_memory_limit() -> int | None:
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    return int(limit) if limit.isdigit() else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _gpu_text(gpus: tuple[Gpu, ...]) -> str:
    return ", ".join(f"{gpu.name} ({gpu.memory_gib:.0f} GiB)" for gpu in gpus)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
