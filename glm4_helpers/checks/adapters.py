"""Whether an adapter belongs to a profile and its base model, and whether it is live.

It is loaded in models.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from ..profiles import Profile
from ..support.errors import ModelError
from ..support.files import write_json
from ..support.paths import CHECKPOINTS, shown
from .weights import base_fingerprint, base_folder, check_weights, damage, read_required_json

FACTS_FILE = "base_model_facts.json"
_UNREAD = ("rank_pattern", "layers_to_transform", "modules_to_save", "target_parameters")
"""Settings of PEFT's LoraConfig that give an adapter other parts than a profile describes."""

_TRAIN_FIX = "Train it with `python -m glm4_helpers train`, or name the folder of a finished adapter."


def save_adapter_facts(adapter_dir: Path, profile: Profile) -> dict[str, Any]:
    """Write next to an adapter which base model it belongs to (FACTS_FILE); `load_adapter` compares. Returns the facts.

    Raises ModelError where the base model's weights are absent.
    """
    folder = base_folder(profile)
    check_weights(folder, profile)
    facts = {"base_model": profile.base_model, "base_fingerprint": base_fingerprint(folder)}
    write_json(Path(adapter_dir) / FACTS_FILE, facts)
    return facts


def read_adapter_facts(adapter_dir: Path) -> dict[str, Any] | None:
    """What `save_adapter_facts` wrote, or None for an adapter that came without."""
    file = Path(adapter_dir) / FACTS_FILE
    return read_required_json(file, _TRAIN_FIX) if file.exists() else None


def check_trained_model(folder: Path) -> None:
    """Raise ModelError where full fine-tuning has not left a model in the folder."""
    if not (Path(folder) / "config.json").is_file():
        raise ModelError(f"There is no trained model in {folder}.", _TRAIN_FIX)


def check_adapter(base_model: PreTrainedModel, adapter_dir: Path, profile: Profile) -> None:
    """Raise ModelError unless the adapter is complete, made for this base model, and live.

    Live: it has the modules that the profile asks for in every layer, no lora_B is all zeros (then it would change
    nothing) and no weight is NaN. An adapter without FACTS_FILE is only warned about: its shapes still have to fit.
    """
    adapter_dir = Path(adapter_dir)
    config = _read_adapter_config(adapter_dir)
    _check_facts(adapter_dir, profile)
    matched = check_target_modules(base_model, config.target_modules)
    tensors = lora_tensors(adapter_dir)
    _check_modules_present(adapter_dir, matched, tensors)
    _check_module_count(base_model, adapter_dir, matched, profile)
    _check_shapes(base_model, adapter_dir, tensors, config.r)
    _check_values(adapter_dir, tensors)


def check_target_modules(model: nn.Module, targets: str | Iterable[str] | None) -> list[str]:
    """Names of the linear modules that LoRA targets match, in order.

    Raises ModelError naming each target that matches none: PEFT skips those in silence, and GLM-4 has its gate and
    up projections fused, so the gate_proj and up_proj of other recipes match nothing here.
    """
    linear = _linear_modules(model)
    if isinstance(targets, str):  # PEFT takes a text as a regular expression for whole names
        targets = [name for name in linear if re.fullmatch(targets, name)] or [targets]
    targets = sorted(targets or ())
    unmatched = [target for target in targets if not any(_matches(name, target) for name in linear)]
    if unmatched or not targets:
        known = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linear))
        asked = ", ".join(unmatched) or "nothing"
        raise ModelError(
            f"The LoRA target modules name {asked}, which {_architecture(model)} does not have.",
            f"Choose among its linear modules: {known}.",
        )
    return [name for name in linear if any(_matches(name, target) for target in targets)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear modules of the base model by name; LoRA's own matrices are not among them."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = {}
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name:
            found[name.removesuffix(".base_layer")] = module
    return found


def _architecture(model: nn.Module) -> str:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return type(base).__name__


def require_adapter(adapter_dir: Path) -> None:
    """Raise ModelError where an adapter's files are absent; after an interrupted training it names the checkpoints."""
    files = ("adapter_config.json", "adapter_model.safetensors")
    absent = [name for name in files if not (adapter_dir / name).is_file()]
    if not absent:
        return
    known = checkpoints(adapter_dir.parent if adapter_dir.name == "adapter" else adapter_dir)
    if known:
        raise ModelError(
            f"There is no adapter in {shown(adapter_dir)}, but there are checkpoints: {', '.join(known)}.",
            f"Choose one, as in --adapter {shown(list(known.values())[-1])}, or finish the training.",
        )
    raise ModelError(f"There is no adapter in {adapter_dir}: {absent[0]} is absent.", _TRAIN_FIX)


def checkpoints(run: Path) -> dict[str, Path]:
    """The adapters in a run's folder by name, `checkpoint-2` before `checkpoint-10`."""
    files = [*run.glob("*/adapter_config.json"), *run.glob(f"{CHECKPOINTS}/*/adapter_config.json")]
    return {folder.name: folder for folder in sorted((file.parent for file in files), key=_natural)}


def _natural(folder: Path) -> list[str | int]:
    """Text and numbers of a name in turn."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", folder.name)]


def _read_adapter_config(adapter_dir: Path) -> PeftConfig:
    require_adapter(adapter_dir)
    problem = damage(adapter_dir / "adapter_model.safetensors")
    if problem:
        raise ModelError(f"{adapter_dir / 'adapter_model.safetensors'} {problem}.", _TRAIN_FIX)
    read_required_json(adapter_dir / "adapter_config.json", _TRAIN_FIX)
    config = PeftConfig.from_pretrained(adapter_dir)
    if getattr(config, "target_modules", None) is None or not hasattr(config, "r"):
        raise ModelError(f"The adapter in {adapter_dir} is not a LoRA adapter.", _TRAIN_FIX)
    unread = [name for name in _UNREAD if getattr(config, name, None)]
    if unread:
        raise ModelError(
            f"The adapter in {adapter_dir} was made with PEFT's {', '.join(unread)}, which this course does not read.",
            "Use it with PEFT itself, or train one without.",
        )
    return config


def _check_facts(adapter_dir: Path, profile: Profile) -> None:
    facts = read_adapter_facts(adapter_dir)
    if facts is None:
        warnings.warn(
            f"{adapter_dir} has no {FACTS_FILE}: whether it is one of {profile.base_model} is judged by shapes only.",
            stacklevel=4,
        )
        return
    found = base_fingerprint(base_folder(profile))
    if facts.get("base_fingerprint") != found:
        raise ModelError(
            f"The adapter in {adapter_dir} was trained on other base weights: {facts.get('base_model')} with "
            f"fingerprint {facts.get('base_fingerprint')}, while {profile.base_model} here has {found}.",
            "Choose the profile it was trained with, or train it again on these weights.",
        )


def lora_tensors(adapter_dir: Path) -> dict[str, torch.Tensor]:
    """LoRA's matrices by their name in the base model, such as model.layers.0.self_attn.q_proj.lora_A."""
    with safe_open(adapter_dir / "adapter_model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if ".lora_A." in name or ".lora_B." in name]
        return {name.removeprefix("base_model.model.").removesuffix(".weight"): file.get_tensor(name) for name in names}


def _check_modules_present(adapter_dir: Path, matched: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> None:
    expected = {f"{name}.lora_{side}" for name in matched for side in "AB"}
    absent, extra = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if absent or extra:
        what = f"lacks {absent[0]}" if absent else f"has {extra[0]}, which this model does not"
        raise ModelError(f"The adapter in {adapter_dir} {what} ({len(absent)} absent, {len(extra)} extra).", _TRAIN_FIX)


def _check_module_count(model: PreTrainedModel, adapter_dir: Path, matched: Sequence[str], profile: Profile) -> None:
    if profile.lora is None:
        return
    layers, targets = model.config.num_hidden_layers, profile.lora.target_modules
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in matched))
    if len(matched) == layers * len(targets) and set(kinds) == {target.rpartition(".")[2] for target in targets}:
        return
    raise ModelError(
        f"The adapter in {adapter_dir} changes {len(matched)} modules ({', '.join(kinds)}); the profile {profile.name} "
        f"expects {layers * len(targets)} ({layers} layers x {', '.join(targets)}).",
        "Use the profile settings it was trained with, or train it again with this profile.",
    )


def _check_shapes(model: nn.Module, adapter_dir: Path, tensors: Mapping[str, torch.Tensor], rank: int) -> None:
    linear = _linear_modules(model)
    for name, tensor in tensors.items():
        module = linear[name.rsplit(".", 1)[0]]
        shape = (rank, module.in_features) if name.endswith("lora_A") else (module.out_features, rank)
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"The adapter in {adapter_dir} does not fit this model: {name} is {tuple(tensor.shape)}, not {shape}.",
                "Choose the profile it was trained with.",
            )


def _check_values(adapter_dir: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"The adapter in {adapter_dir} has NaN or infinite values in {name}.", _TRAIN_FIX)
        if name.endswith("lora_B") and not tensor.any():
            raise ModelError(
                f"The adapter in {adapter_dir} is not live: {name} is all zeros and changes nothing.", _TRAIN_FIX
            )
