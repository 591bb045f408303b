"""How much memory training takes on a CPU: `memory`'s sum with what differs there, to be compared with rehearsals.

Like the measurements, without what the C library keeps of freed memory, which depends on its settings.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from glm4_helpers.machine import memory
from glm4_helpers.machine.memory import COMPUTE_BYTES, Estimate, Part, Setting, Shape
from glm4_helpers.profiles import Profile


def estimate(profile: Profile, setting: Setting, config: Any) -> Estimate:
    """The peak of the process above its imports, part by part. `config` is a transformers config or a Shape."""
    shape = config if isinstance(config, Shape) else memory.shape_of(config)
    setting = dataclasses.replace(setting, device="cpu")
    base = memory.estimate_memory(profile, setting, shape, layer_bytes(shape, profile, setting))
    parts = {part.name: part for part in base.parts}
    if setting.quantization is None and profile.lora is not None:
        parts["weights"] = Part(
            "weights",
            (shape.parameters - shape.looked_up) * COMPUTE_BYTES,
            f"({shape.parameters:,} parameters - {shape.looked_up:,} of the embedding table) x 2 bytes",
            "safetensors maps the files into memory: a page is resident once it is read, and of the table few rows are",
        )
    step = sum(parts[name].bytes for name in ("activations", "logits", "a layer beyond logits") if name in parts)
    copy = shape.vocabulary * shape.hidden * COMPUTE_BYTES
    parts["an answer beyond a step"] = Part(
        "an answer beyond a step",
        max(0, copy - step),
        f"{shape.vocabulary:,} x {shape.hidden:,} x 2 bytes - {step:,} of a step",
        "generate takes the last position's slice, which torch.matmul does not fold: it copies lm_head, once for "
        "each question of a batch (should_fold in ATen's LinearAlgebra.cpp); one question is counted",
    )
    return Estimate(profile.name, setting, tuple(part for part in parts.values() if part.bytes))


def layer_bytes(shape: Shape, profile: Profile, setting: Setting) -> int:
    """Bytes a token that autograd keeps of one layer on a CPU.

    There is no autocast there: LoRA's inputs and dropout's noise are in the adapter's dtype, not in bfloat16 and bytes.
    """
    kept = memory.layer_bytes(shape, profile, setting)
    if profile.lora is None:
        return kept
    adapter = COMPUTE_BYTES if setting.quantization else 4
    wider, noise = adapter - COMPUTE_BYTES, adapter - 1 if profile.lora.dropout else 0
    inputs = [memory.inputs_of(shape, name) for name in profile.lora.target_modules]
    return kept + sum((wider + noise) * each + wider * profile.lora.r for each in inputs)
