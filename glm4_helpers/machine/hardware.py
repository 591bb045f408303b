"""What this machine is: processor, memory, disk and GPUs. It only looks.

Whether that is enough for a profile is asked in room and in the doctor.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ..support.files import GIB


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
        gpu = gpu_text(self.gpus) if self.gpus else "no GPU"
        return f"{self.cpu}, {counted(self.cores, 'core')}, {self.memory_gib:.0f} GiB memory, {gpu}, torch {self.torch}"


def this_machine(folder: Path | None = None) -> Machine:
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
        torch=package_version("torch"),
        driver=nvidia_driver()[0],
    )


def package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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


def nvidia_driver() -> tuple[str | None, tuple[float, ...]]:
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


def gpu_text(gpus: tuple[Gpu, ...]) -> str:
    return ", ".join(f"{gpu.name} ({gpu.memory_gib:.0f} GiB)" for gpu in gpus)


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
