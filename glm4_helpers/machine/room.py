"""Room for a training: memory and disk, before anything is loaded or written.

How much memory a setting takes is worked out in memory.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from ..profiles import Needs, Profile
from ..support.files import GIB, require_disk
from ..support.paths import CHECKPOINTS
from . import gpus, hardware, memory


def needs(profile: Profile) -> Needs:
    """Estimated needs for training with `profile` on one GPU.

    GPU memory is what `estimate_memory` gives for the profile's own setting. Disk space is for the download, with a
    fifth to spare, and the checkpoints that `train` asks room for.
    """
    if profile.needs is not None:
        return profile.needs
    shape = memory.published_shape(profile)
    return Needs(
        memory_gib=8,
        gpu_memory_gib=memory_on_each(profile, 1),
        disk_gib=round(shape.parameters * 2 / GIB * 1.2 + _checkpoint_gib(profile, shape, 0) + 1),
    )


def memory_on_each(profile: Profile, count: int) -> float:
    """GiB on each of `count` GPUs that train the profile; several share a full fine-tuning with ZeRO-3."""
    sharing = {"gpus": count, "zero_stage": 3} if count > 1 and profile.lora is None else {}
    setting = memory.setting_of(profile, **sharing)
    return round(memory.estimate_memory(profile, setting, memory.published_shape(profile)).total_gib, 1)


def require_room(
    profile: Profile, folder: Path, lengths: Sequence[int], processes: int = 1, zero_stage: int = 0
) -> None:
    """Raise MachineError, with the numbers and the nearest setting that fits, where a training can't have its memory
    or its disk space. ``lengths`` are those of all rows in tokens; ``folder`` is where checkpoints go."""
    from ..checks.shapes import model_config

    on_gpu = gpus.default_device().type == "cuda"
    here = hardware.this_machine()
    shape = memory.shape_of(model_config(profile))
    # Those of an interrupted run make room as new ones come.
    there = sum(file.stat().st_size for file in (folder / CHECKPOINTS).rglob("*") if file.is_file())
    require_disk(
        folder,
        _checkpoint_gib(profile, shape, zero_stage) * GIB - there,
        f"A training with checkpoints of {profile.name}",
        "Free some space, give another folder (--output), or lower training.evaluations_per_run.",
    )
    setting = memory.setting_of(
        profile,
        length=max(lengths),
        lengths=tuple(lengths),
        gpus=processes,
        zero_stage=zero_stage,
        triton=importlib.util.find_spec("triton") is not None,
        device="gpu" if on_gpu else "cpu",
    )
    memory.require_memory(profile, _free_gib() if on_gpu else here.memory_available_gib / processes, setting, shape)


def launched_zero_stage() -> int:
    """The ZeRO stage that `accelerate launch` started this process with; FSDP, which divides as much, counts as 3."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return 3
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0"))


def _checkpoint_gib(profile: Profile, shape: memory.Shape, zero_stage: int) -> float:
    """Checkpoints and the result: trained weights with AdamW's two states; LoRA keeps every checkpoint, in float32.

    In full fine-tuning two stay, and a third is there until the oldest is gone. DeepSpeed saves its states and its copy
    of the weights in float32: 14 bytes a weight instead of 6 (runtime/zero/, stages 1 to 3).
    """
    if profile.lora:
        return memory.lora_parameters(shape, profile) * 4 * 3 * (profile.training.evaluations_per_run + 1) / GIB
    return shape.parameters * (3 * (14 if zero_stage else 6) + 2) / GIB


def _free_gib() -> float:
    import torch

    return torch.cuda.mem_get_info()[0] / GIB
