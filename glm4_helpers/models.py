"""Loads a profile's tokenizer, base model and adapter, chooses the dtype, and switches the adapter off.

Text is generated in generation and adapters are trained in training. The rooms checks and machine say whether weights,
adapter and GPU are fit for it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .checks import chat_template
from .checks.adapters import check_adapter
from .checks.weights import base_folder, check_architecture, check_loaded, check_weights, require_json, weights_fix
from .machine import gpus, hardware
from .profiles import Profile
from .support.errors import MachineError, ModelError, SettingError, renamed_names_ignored


def load_tokenizer(profile: Profile) -> PreTrainedTokenizerBase:
    """The tokenizer in `base_folder(profile)`. It pads on the left with its terminator, `<|endoftext|>`.

    Raises ModelError where its files are absent, or its special tokens or chat template don't follow GLM-4's format.
    Shown in 01, 1.4.
    """
    folder = base_folder(profile)
    require_json(folder, ("tokenizer.json", "tokenizer_config.json"), profile)
    if (folder / "config.json").is_file():  # transformers reads it too, and would ask whether to run code it names
        check_architecture(folder, profile)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", local_files_only=True)
    except Exception as error:  # the tokenizers library raises KeyError, ValueError and plain Exception
        raise ModelError(f"The tokenizer in {folder} can't be loaded: {error!r}.", weights_fix(profile)) from error
    tokenizer.pad_token = next(iter(chat_template.read_format(tokenizer).stops))
    return tokenizer


def load_base_model(
    profile: Profile, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None
) -> PreTrainedModel:
    """The base model in `base_folder(profile)`, in evaluation mode, with sdpa attention and the three stop ids.

    `dtype` None takes the profile's; `resolve_dtype` says what "auto" means. `device` None takes this process's GPU,
    or the CPU where there is none. Raises ModelError where weights are absent, incomplete or damaged, and MachineError
    as `check_gpu` does.
    Shown in 01, 1.4.
    """
    if device is None or torch.device(device).type == "cuda":
        check_gpu(profile, dtype)
    folder = base_folder(profile)
    check_weights(folder, profile)
    device = torch.device(device) if device is not None else gpus.default_device()
    options: dict[str, Any] = {"dtype": resolve_dtype(dtype or profile.dtype)}
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
    check_loaded(found, folder, profile)
    set_stop_ids(model, load_tokenizer(profile))
    model.generation_config.max_length = None  # chat models ship one, and transformers warns at every answer
    if profile.quantization is not None and device.type == "cpu":
        _keep_trainable(model)
        _close_files(model)
    return model.eval() if profile.quantization is not None else model.to(device).eval()


def set_stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put the three stop ids and the padding id on the model's config and generation config; a Trainer keeps them."""
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = chat_template.stop_ids(tokenizer)
        settings.pad_token_id = tokenizer.pad_token_id


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype with a name such as "bfloat16". Raises SettingError for any other name.

    "auto" is bfloat16 on a GPU that has it in hardware and float32 everywhere else, so that the same machine always
    computes in the same dtype. `dtype_reason` explains the choice.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if gpus.native_bfloat16() else torch.float32
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise SettingError(f"{dtype!r} is not a dtype for weights.", 'Use "auto", "float32" or "bfloat16".')
    return found


def dtype_reason(dtype: str | torch.dtype) -> str:
    """What `resolve_dtype` gives and why, such as "float32: this GPU (Tesla T4) only emulates bfloat16".

    Shown in 01, 1.4.
    """
    name = str(resolve_dtype(dtype)).removeprefix("torch.")
    if dtype != "auto":
        return f"{name}: as set"
    if not torch.cuda.is_available():
        return f"{name}: computed on the CPU"
    what = "has bfloat16 in hardware" if gpus.native_bfloat16() else "only emulates bfloat16"
    return f"{name}: this GPU ({torch.cuda.get_device_name()}) {what}"


def check_gpu(profile: Profile, dtype: str | torch.dtype | None = None) -> None:
    """Raise MachineError where there is a GPU that can't compute for the profile. Loads nothing.

    Either this torch can't use the GPU (it was built for the CPU, a newer driver or other cards), or the weights are in
    bfloat16 or 4 bits and the GPU only emulates bfloat16. `dtype` None takes the profile's.
    """
    needs_bfloat16 = profile.quantization is not None or resolve_dtype(dtype or profile.dtype) == torch.bfloat16
    if not torch.cuda.is_available():
        if needs_bfloat16 and gpus.unused_nvidia_gpu():
            raise MachineError(
                f"There is an NVIDIA GPU, and torch {torch.__version__} can't use it.",
                f"{gpus.torch_fix()}   (or choose the CPU: set CUDA_VISIBLE_DEVICES to nothing)",
            )
        return
    card = hardware.cuda_gpu(gpus.default_device().index or 0)
    if not card.in_build:
        raise MachineError(
            f"torch {torch.__version__} was built without code for this GPU ({card.name}).", gpus.torch_fix()
        )
    if needs_bfloat16 and not gpus.native_bfloat16():
        raise MachineError(
            f"{profile.name} computes in bfloat16, which this GPU ({card.name}) only emulates; "
            "float16 gives NaN on GLM-4.",
            gpus.BFLOAT16_FIX,
        )


def _quantization(profile: Profile) -> BitsAndBytesConfig:
    """QLoRA's 4-bit settings: NF4, double quantization, arithmetic in bfloat16 (fp16 gives NaN in GLM-4)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MachineError(
            f"The profile {profile.name} needs the package bitsandbytes for its {profile.quantization} weights.",
            'Run: python -m pip install -e ".[bitsandbytes]"',
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=profile.quantization,
        bnb_4bit_compute_dtype=torch.bfloat16,
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

    Otherwise all that was read of the files stays in memory, the 16-bit weights that are no longer needed included.
    """
    for weight in model.parameters():
        if weight.dtype.is_floating_point:  # 4-bit ones are bytes
            weight.data = weight.data.clone()


def load_adapter(base_model: PreTrainedModel, adapter_dir: Path, profile: Profile) -> PeftModel:
    """The base model with the adapter on it, in evaluation mode, after `check_adapter`.

    Raises ModelError, and leaves the base model unchanged, where the model already has an adapter or this one doesn't
    fit.
    Shown in 04, 4.5.
    """
    if isinstance(base_model, PeftModel):
        raise ModelError("This model already carries an adapter.", "Take it off first: base_model = model.unload().")
    check_adapter(base_model, adapter_dir, profile)
    with renamed_names_ignored():
        return PeftModel.from_pretrained(base_model, adapter_dir, is_trainable=False).eval()


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[nn.Module]:
    """The same weights without the adapter while the block runs; a model without an adapter is yielded unchanged.

    Shown in 04, 4.5.
    """
    if not isinstance(model, PeftModel):
        yield model
        return
    with gradients_as_found(model), model.disable_adapter():
        yield model


@contextmanager
def gradients_as_found(model: nn.Module) -> Iterator[None]:
    """Restore `requires_grad` of every weight afterwards: PEFT sets it when it switches an adapter on."""
    found = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        yield
    finally:
        for weight, trainable in found:
            weight.requires_grad_(trainable)
