"""Tokenizer, base model and adapter from a profile, what they are made of, and whether an adapter is live.

Generating text lives in generation, training in training; memory needs are worked out in memory.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GlmConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import chat_format
from .errors import MachineError, ModelError, SettingError
from .paths import home
from .profiles import Profile

FACTS_FILE = "base_model_facts.json"
PARTS = ("embeddings", "attention", "mlp", "norms", "lm_head", "adapter", "other")
_TRAIN_FIX = "Train it with `python -m glm4_helpers train`, or name the folder of a finished adapter."


# Loading


def base_folder(profile: Profile) -> Path:
    """Where the profile's base model is, whether its files are there yet or not."""
    return home() / profile.base_model


def load_tokenizer(profile: Profile) -> PreTrainedTokenizerBase:
    """The tokenizer in `base_folder(profile)`, padding on the left with its terminator (`<|endoftext|>`).

    Raises ModelError where its files are absent, or its special tokens or chat template are not of GLM-4's kind.
    """
    folder = base_folder(profile)
    _require_json(folder, ("tokenizer.json", "tokenizer_config.json"), profile)
    if (folder / "config.json").is_file():  # transformers reads it too, and would ask whether to run code it names
        _check_architecture(folder, profile)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", local_files_only=True)
    except Exception as error:  # the tokenizers library raises KeyError, ValueError and plain Exception
        raise ModelError(f"The tokenizer in {folder} can't be loaded: {error!r}.", _weights_fix(profile)) from error
    tokenizer.pad_token = next(iter(chat_format.read_format(tokenizer).stops))
    return tokenizer


def load_base_model(
    profile: Profile, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None
) -> PreTrainedModel:
    """The base model in `base_folder(profile)`, in evaluation mode, with sdpa attention and the three stop ids.

    `dtype` None takes the profile's; "auto" is `faster_dtype()`. `device` None is this process's GPU where there is
    one, else the CPU. Raises ModelError where weights are absent, partly there or damaged, MachineError for a GPU
    without bfloat16.
    """
    folder = base_folder(profile)
    check_weights(folder, profile)
    device = torch.device(device) if device is not None else default_device()
    options: dict[str, Any] = {"dtype": resolve_dtype(dtype or profile.dtype)}
    if device.type == "cuda":
        _refuse_float16_gpu(profile, options["dtype"])
    if profile.quantization is not None:
        options |= {"quantization_config": _quantization(profile), "device_map": {"": device}}
    model, found = AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="sdpa",
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, by name
        **options,
    )
    _check_loaded(found, folder, profile)
    set_stop_ids(model, load_tokenizer(profile))
    model.generation_config.max_length = None  # chat models ship one, and transformers warns at every answer
    if profile.quantization is not None and device.type == "cpu":
        _keep_trainable(model)
        _close_files(model)
    return model.eval() if profile.quantization is not None else model.to(device).eval()


def default_device() -> torch.device:
    """This process's GPU where there is one (LOCAL_RANK among several), else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def set_stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put the three stop ids and the padding id on the model's config and generation config.

    To be called again after a Trainer was built: it aligns both with the tokenizer, which knows one eos only.
    """
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = chat_format.stop_ids(tokenizer)
        settings.pad_token_id = tokenizer.pad_token_id


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a name such as "bfloat16"; "auto" is `faster_dtype()`. Raises SettingError for other names."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return faster_dtype()
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise SettingError(f"{dtype!r} is not a dtype for weights.", 'Use "auto", "float32" or "bfloat16".')
    return found


@cache
def faster_dtype() -> torch.dtype:
    """bfloat16 where it trains faster than float32 on this machine, else float32.

    GPUs answer for themselves. A CPU without bf16 instructions gets float32; one with them is timed on a small
    training step (about two seconds), and bfloat16 must win by a tenth. On a busy machine the choice may differ from
    run to run: whatever has to be repeated exactly should keep the dtype it started with.
    """
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if not cpu_has_bf16():
        return torch.float32
    seconds = _step_seconds(torch.float32, torch.bfloat16)
    return torch.bfloat16 if seconds[torch.bfloat16] * 1.1 < seconds[torch.float32] else torch.float32


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AMX, AVX-512 or ARM), as torch or the kernel names it."""
    known = {"amx_bf16", "avx512_bf16", "sve_bf16", "svebf16", "bf16"}
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.6, the oldest allowed, has no such function
        return any(found for name, found in torch.cpu.get_capabilities().items() if name in known)
    flags = Path("/proc/cpuinfo")
    return flags.exists() and not known.isdisjoint(flags.read_text(encoding="utf-8").split())


def _step_seconds(*dtypes: torch.dtype, budget: float = 2.0) -> dict[torch.dtype, float]:
    """Seconds of the fastest training step (512 tokens) of a small GLM in each dtype.

    The dtypes take turns, so that what else the machine does meets all of them, for `budget` seconds, three turns at
    least and twelve at most.
    """
    config = GlmConfig(
        vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, pad_token_id=0, eos_token_id=[1],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        ids = torch.randint(0, 512, (8, 64))
        timed = {dtype: AutoModelForCausalLM.from_config(config, dtype=dtype).train() for dtype in dtypes}
        start, steps = time.perf_counter(), []
        while len(steps) < 3 or (len(steps) < 12 and time.perf_counter() - start < budget):
            steps.append({dtype: _timed_step(model, ids) for dtype, model in timed.items()})
    return {dtype: min(step[dtype] for step in steps) for dtype in dtypes}


def _timed_step(model: nn.Module, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    return time.perf_counter() - start


def _quantization(profile: Profile) -> BitsAndBytesConfig:
    """QLoRA's 4-bit settings: NF4, double quantization, arithmetic in bfloat16 (fp16 gives NaN in GLM-4).

    A GPU without bfloat16 computes in float32, which is several times slower.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MachineError(
            f"The profile {profile.name} needs the package bitsandbytes for its {profile.quantization} weights.",
            'Run: python -m pip install -e ".[bitsandbytes]"',
        )
    dtype = torch.bfloat16 if _computes_bfloat16() else torch.float32
    if dtype == torch.float32:
        warnings.warn("This GPU has no bfloat16: computing in float32, which is several times slower.", stacklevel=3)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=profile.quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )


def _keep_trainable(model: nn.Module) -> None:
    """Switch off what bitsandbytes 0.50 does on a CPU with AVX512-BF16 at the first answer or evaluation.

    Linear4bit.forward then repacks its weights for a kernel that has no backward pass, and training can't go on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _close_files(model: nn.Module) -> None:
    """Copy the weights that are not quantized out of the files they are mapped from.

    The files would stay in memory with all that was read of them, the weights in 16 bits that are not needed any more.
    """
    for weight in model.parameters():
        if weight.dtype.is_floating_point:  # 4-bit ones are bytes
            weight.data = weight.data.clone()


def _computes_bfloat16() -> bool:
    """Whether what the model runs on has bfloat16 of its own: every CPU, and GPUs from NVIDIA's Ampere on."""
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def _refuse_float16_gpu(profile: Profile, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and profile.quantization is None and not _computes_bfloat16():
        raise MachineError(
            f"{profile.name} computes in bfloat16, which this GPU ({torch.cuda.get_device_name()}) does not have; "
            "float16 gives NaN on GLM-4.",
            "Take a GPU with bfloat16 (NVIDIA: Ampere or newer), or --profile glm-4-9b-qlora, which then computes in float32.",
        )


# Files of a base model


def check_weights(folder: Path, profile: Profile) -> None:
    """Raise ModelError, naming the first file at fault, unless config and all weights are there and whole.

    The config has to be of the profile's architecture: another one, or the old format with its own code, is refused.
    """
    _require_json(folder, ("config.json",), profile)
    _check_architecture(folder, profile)
    for file in weight_files(folder, profile):
        problem = _damage(file)
        if problem:
            raise ModelError(f"{file} {problem}.", _weights_fix(profile))


def _check_architecture(folder: Path, profile: Profile) -> None:
    config = _read_json(folder / "config.json", _weights_fix(profile))
    architecture = (config.get("architectures") or ["model without an architecture"])[0]
    if architecture == profile.architecture and "auto_map" not in config:
        return
    old = ", in the old format that needs its own remote code" if "auto_map" in config else ""
    raise ModelError(
        f"{folder} holds a {architecture}{old}; {profile.name} needs {profile.architecture}.",
        f"Choose the profile of that model, or move the folder away. {_weights_fix(profile)}",
    )


def _check_loaded(found: Mapping[str, Any], folder: Path, profile: Profile) -> None:
    """Raise ModelError for weights that transformers would replace by random ones."""
    absent, misfits = sorted(found["missing_keys"]), sorted(key[0] for key in found["mismatched_keys"])
    if absent or misfits:
        what = f"lack {absent[0]}" if absent else f"hold {misfits[0]} in another shape than config.json says"
        raise ModelError(
            f"The weights in {folder} {what} ({len(absent)} absent, {len(misfits)} of another shape).", _weights_fix(profile)
        )


def weight_files(folder: Path, profile: Profile) -> list[Path]:
    """The safetensors files of a model folder, in order. Raises ModelError for the first one that is absent."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        _require_files(folder, ("model.safetensors",), profile)
        return [folder / "model.safetensors"]
    names = sorted(set(_read_json(index, _weights_fix(profile)).get("weight_map", {}).values()))
    if not names:
        raise ModelError(f"{index} names no files.", _weights_fix(profile))
    _require_files(folder, names, profile)
    return [folder / name for name in names]


def base_fingerprint(folder: Path) -> str:
    """A short digest that changes with a model's shape or weights: config, file headers and samples of the data.

    Reads about 64 KB a file, so it takes no time for 9B either. Settings that don't change the weights (versions,
    stop ids) stay out. Raises OSError for a folder without a model.
    """
    digest = hashlib.sha256()
    config = _read_json(folder / "config.json", "Get the file again.")
    volatile = ("transformers_version", "_name_or_path", "eos_token_id", "pad_token_id", "use_cache", "dtype")
    kept = {key: value for key, value in config.items() if key not in (*volatile, "torch_dtype")}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(_sampled(file))
    return digest.hexdigest()[:16]


def _sampled(file: Path, samples: int = 16, block: int = 4096) -> bytes:
    """The header of a safetensors file and evenly spaced blocks of its data."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        parts = [stream.read(min(length, size))]
        for number in range(samples):
            stream.seek(8 + length + (size - 8 - length) * number // samples)
            parts.append(stream.read(block))
    return b"".join(parts)


def _damage(file: Path) -> str | None:
    """What is wrong with a safetensors file, judged by its header and size; None when it is whole."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if start.startswith(b"version "):
            return "is a Git LFS pointer, not weights"
        if size < 8 or length > size:
            return "is not a complete safetensors file"
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return "is not a safetensors file"
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    return None if size == expected else f"has {size:,} bytes where {expected:,} are expected"


def _require_files(folder: Path, names: Iterable[str], profile: Profile) -> None:
    if not folder.is_dir():
        raise ModelError(f"The model of {profile.name} is not here: no folder {folder}.", _weights_fix(profile))
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(f"The model of {profile.name} is incomplete: no {folder / name}.", _weights_fix(profile))


def _require_json(folder: Path, names: Iterable[str], profile: Profile) -> None:
    _require_files(folder, names, profile)
    for name in names:
        _read_json(folder / name, _weights_fix(profile))


def _weights_fix(profile: Profile) -> str:
    if profile.hub_id is None:
        return f"Run: git checkout -- {profile.base_model}   (it ships with the repository)"
    return f"Run: python -m glm4_helpers download --profile {profile.name}   (complete files are kept)"


def _read_json(file: Path, fix: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}.", fix) from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no settings but {type(content).__name__}.", fix)
    return content


# Adapters


def save_adapter_facts(adapter_dir: Path, profile: Profile) -> dict[str, Any]:
    """Write beside an adapter which base model it belongs to (FACTS_FILE); `load_adapter` compares. Returns the facts.

    Raises ModelError where the base model's weights are absent.
    """
    folder = base_folder(profile)
    check_weights(folder, profile)
    facts = {"base_model": profile.base_model, "base_fingerprint": base_fingerprint(folder)}
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    (Path(adapter_dir) / FACTS_FILE).write_text(text, encoding="utf-8")
    return facts


def read_adapter_facts(adapter_dir: Path) -> dict[str, Any] | None:
    """What `save_adapter_facts` wrote, or None for an adapter that came without."""
    file = Path(adapter_dir) / FACTS_FILE
    return _read_json(file, _TRAIN_FIX) if file.exists() else None


def load_adapter(base_model: PreTrainedModel, adapter_dir: Path, profile: Profile) -> PeftModel:
    """The base model with the adapter on it, in evaluation mode, after `check_adapter`.

    Raises ModelError; the base model is then left as it was.
    """
    if isinstance(base_model, PeftModel):
        raise ModelError("This model already carries an adapter.", "Take it off first: base_model = model.unload().")
    check_adapter(base_model, adapter_dir, profile)
    with warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that transformers 5.23 has renamed; there is nothing a learner could change.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return PeftModel.from_pretrained(base_model, adapter_dir, is_trainable=False).eval()


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


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[nn.Module]:
    """The same weights without the adapter while the block runs; a model without one passes unchanged."""
    if not isinstance(model, PeftModel):
        yield model
        return
    with gradients_as_found(model), model.disable_adapter():
        yield model


@contextmanager
def gradients_as_found(model: nn.Module) -> Iterator[None]:
    """Afterwards the same weights are trainable as before: PEFT makes an adapter trainable when it switches it on."""
    found = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        yield
    finally:
        for weight, trainable in found:
            weight.requires_grad_(trainable)


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


def _read_adapter_config(adapter_dir: Path) -> PeftConfig:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter_dir / name).is_file():
            raise ModelError(f"There is no adapter in {adapter_dir}: {name} is absent.", _TRAIN_FIX)
    problem = _damage(adapter_dir / "adapter_model.safetensors")
    if problem:
        raise ModelError(f"{adapter_dir / 'adapter_model.safetensors'} {problem}.", _TRAIN_FIX)
    _read_json(adapter_dir / "adapter_config.json", _TRAIN_FIX)
    config = PeftConfig.from_pretrained(adapter_dir)
    if getattr(config, "target_modules", None) is None or not hasattr(config, "r"):
        raise ModelError(f"The adapter in {adapter_dir} is not a LoRA adapter.", _TRAIN_FIX)
    return config


def _check_facts(adapter_dir: Path, profile: Profile) -> None:
    facts = read_adapter_facts(adapter_dir)
    if facts is None:
        warnings.warn(
            f"{adapter_dir} has no {FACTS_FILE}: its base model, {profile.base_model} or not, is judged by shapes only.",
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


def _check_module_count(
    model: PreTrainedModel, adapter_dir: Path, matched: Sequence[str], profile: Profile
) -> None:
    if profile.lora is None:
        return
    layers, targets = model.config.num_hidden_layers, profile.lora.target_modules
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in matched))
    if len(matched) == layers * len(targets) and set(kinds) == {target.rpartition(".")[2] for target in targets}:
        return
    raise ModelError(
        f"The adapter in {adapter_dir} changes {len(matched)} modules ({', '.join(kinds)}); the profile {profile.name} expects "
        f"{layers * len(targets)} ({layers} layers x {', '.join(targets)}).",
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


# What a model is made of


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
        raise ModelError(f"The shape of {profile.base_model} is not known here: no config.json.", _weights_fix(profile))
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
