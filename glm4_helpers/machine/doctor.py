"""What this machine is, which of its GPUs a process uses, and whether it is enough for a profile: the doctor.

Nothing is installed or downloaded. How much memory a profile takes is worked out in memory.
Light to import; torch is imported when the GPU is asked for.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..profiles import Profile, get_profile, profile_names
from ..support.errors import CourseError
from ..support.files import GIB
from ..support.fonts import CHINESE_FONTS, SHIPPED_FONT
from ..support.paths import home
from . import hardware
from .gpus import BFLOAT16_FIX, TORCH, torch_fix, torch_index
from .hardware import Gpu, Machine, counted, gpu_text, package_version, this_machine
from .room import memory_on_each, needs


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


def doctor(profile: Profile | None = None) -> Report:
    """Checks whether this machine, its packages and its files are enough for ``profile``."""
    profile = profile or get_profile()
    here = this_machine(_course_folder())
    checks = [
        _python_check(),
        *_package_checks(profile),
        Check("CPU", True, f"{here.cpu}, {counted(here.cores, 'core')}, {here.instructions}"),
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
    verdict = "All checks passed." if report.ok else f"{counted(failed, 'check')} failed."
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
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
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
    version = package_version(requirement.name)
    fix = f'python -m pip install "{line}"'
    if version is None:
        return Check(requirement.name, False, "not installed", fix)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(requirement.name, False, f"{version}, but {requirement.specifier} is needed", fix)
    return Check(requirement.name, True, version)


# --- what a profile needs -------------------------------------------------------------------------------------------


def _profile_check(here: Machine, name: str) -> Check:
    """Whether the hardware is enough; packages and files can be fetched and are left out."""
    profile = get_profile(name)
    need = needs(profile)
    disk_gib = need.disk_gib - _downloaded_gib(profile)
    wanted = f"{need.memory_gib:.0f} GiB memory, {disk_gib:.0f} GiB disk"
    if need.gpu_memory_gib:
        wanted += f", {need.gpu_memory_gib:.0f} GiB on one GPU with bfloat16"
    ok = _gpu_check(here, profile).ok and here.memory_gib >= need.memory_gib and here.disk_free_gib >= disk_gib
    return Check(name, ok, f"needs {wanted}", "" if ok else "Take a larger machine, or a smaller profile.")


def _gpu_check(here: Machine, profile: Profile) -> Check:
    need = needs(profile).gpu_memory_gib
    texts = [gpu_text(here.gpus), *map(_bfloat16_text, here.gpus[:1]), _several_text(here.gpus)]
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
    if max(gpu.memory_gib for gpu in gpus) >= need:
        return "", ""
    fix = "Take a larger GPU, or a smaller profile with --profile; training.max_length also lowers the need."
    if len(gpus) == 1:
        return f"{need:.0f} GiB needed", fix
    each = memory_on_each(profile, len(gpus))
    if min(gpu.memory_gib for gpu in gpus) >= each:
        return "", ""
    return f"{need:.0f} GiB needed on one, or {each:.0f} on each of {len(gpus)} with ZeRO-3", fix


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
    index = torch_index(*hardware.nvidia_driver()) or "none, the driver is too old"
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
    if SHIPPED_FONT.is_file():
        return Check("Chinese font", True, "none installed; plots use the one that comes with the course")
    fix = "Install one (Debian, Ubuntu: sudo apt install fonts-noto-cjk), then run this again."
    return Check("Chinese font", False, "none that matplotlib knows", fix)
