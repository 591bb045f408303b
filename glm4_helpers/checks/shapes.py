"""What a model is made of: its shape without weights, its parameters by part, its tree of modules.

The memory that it takes is worked out in machine.memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..profiles import Profile
from ..support.errors import ModelError
from .weights import base_folder, weights_fix

PARTS = ("embeddings", "attention", "mlp", "norms", "lm_head", "adapter", "other")


def meta_model(source: Profile | PreTrainedConfig) -> PreTrainedModel:
    """The model's modules and shapes on torch's meta device: no weights, no memory, so 9B takes a second or two.

    A profile whose weights are not here is built from its `shape`; raises ModelError for one that has none.
    """
    config = source if isinstance(source, PreTrainedConfig) else model_config(source)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")


def model_config(profile: Profile) -> PreTrainedConfig:
    """The config in `base_folder(profile)`, else one of the profile's `shape`.

    Raises ModelError where there is neither.
    """
    folder = base_folder(profile)
    if (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    if profile.shape is None:
        raise ModelError(f"The shape of {profile.base_model} is not known here: no config.json.", weights_fix(profile))
    return AutoConfig.for_model(**profile.shape)


def parameter_table(model: nn.Module) -> list[dict[str, Any]]:
    """Rows of part, parameters, trainable and share (of all), one for each of PARTS that occurs, then "total".

    Shared weights (a tied lm_head) count once, where they first occur. 4-bit weights count as stored.
    """
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        row = counts[_part_of(name)]
        row[0] += parameter.numel()
        row[1] += parameter.numel() if parameter.requires_grad else 0
    total, trainable = (sum(row[column] for row in counts.values()) for column in (0, 1))
    rows = [(part, *row) for part, row in counts.items() if row[0]] + [("total", total, trainable)]
    return [
        {"part": part, "parameters": count, "trainable": train, "share": count / total} for part, count, train in rows
    ]


def _part_of(name: str) -> str:
    signs = (("lora_", "adapter"), ("embed", "embeddings"), ("norm", "norms"), ("lm_head", "lm_head"))
    signs += (("self_attn", "attention"), ("mlp", "mlp"))
    return next((part for sign, part in signs if sign in name), "other")


def structure(model: nn.Module) -> str:
    """A short text tree of the model with shapes (`in -> out` for linear modules); equal layers are shown once."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "\n".join([type(base).__name__, *_branches(base, "")])


def _branches(module: nn.Module, indent: str) -> Iterator[str]:
    children = list(module.named_children())
    for number, (name, child) in enumerate(children, 1):
        last = number == len(children)
        repeated = isinstance(child, nn.ModuleList) and len(child) > 0
        label = f"{name} x {len(child)}" if repeated else name
        shown = child[0] if repeated else child
        yield f"{indent}{'└─' if last else '├─'} {label}  {_describe(shown)}".rstrip()
        if not _is_leaf(shown):
            yield from _branches(shown, indent + ("   " if last else "│  "))


def _is_leaf(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") or not any(True for _ in module.children())


def _describe(module: nn.Module) -> str:
    inner = getattr(module, "base_layer", module)
    if isinstance(inner, nn.Linear):
        text = f"{inner.in_features} -> {inner.out_features}" + (", bias" if inner.bias is not None else "")
    else:
        shapes = [tuple(parameter.shape) for parameter in inner.parameters(recurse=False)]
        text = ", ".join([type(inner).__name__, *(" x ".join(map(str, shape)) for shape in shapes)])
    return text + _describe_lora(module)


def _describe_lora(module: nn.Module) -> str:
    ranks = getattr(module, "r", None)
    if not isinstance(ranks, dict) or not ranks:
        return ""
    count = sum(prod(weight.shape) for name, weight in module.named_parameters() if "lora_" in name)
    return f"  + LoRA r={next(iter(ranks.values()))} ({count:,} parameters)"
