"""Which GPU a process uses, what it can compute, and which build of torch fits it.

What is free on it is asked in room.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from ..support.errors import SettingError
from . import hardware

if TYPE_CHECKING:
    import torch

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


def unused_nvidia_gpu() -> bool:
    """Whether NVIDIA's driver names a GPU that torch doesn't see, without being told not to."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    return not hidden and not torch.cuda.is_available() and bool(hardware.nvidia_driver()[1])


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
    driver, capabilities = hardware.nvidia_driver()
    index = torch_index(driver, capabilities) if driver else "cu130"
    if index is None:
        return f"Update NVIDIA's driver {driver} to 580 or newer: torch {TORCH} has no build for it and these cards."
    return f"python -m pip install torch=={TORCH}+{index} --index-url https://download.pytorch.org/whl/{index}"


def default_device() -> torch.device:
    """This process's GPU where there is one (LOCAL_RANK among several), else the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) if launched() else 0)


def native_bfloat16() -> bool:
    """Whether there is a GPU and it has bfloat16 in hardware: NVIDIA's from Ampere on, AMD's.

    A T4 or V100 emulates it, several times slower than float32. Autocast in bfloat16 pays only where this is true.
    """
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
