"""The base model glm4-nano: its tokenizer, its shape and its pretraining.

The text comes from text.py, through the files in data/. Fine-tuning and scoring live elsewhere.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

from glm4_helpers.checks.chat_template import stop_ids
from glm4_helpers.cli.export import save_tokenizer
from glm4_helpers.support.errors import MachineError, ModelError

from .tokenizer import glm4_tokenizer


def build_tokenizer(characters: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character and the special tokens of GLM-4.

    Order of ids: 256 byte tokens, the characters sorted, the special tokens in GLM-4's order. A character outside
    the vocabulary becomes its UTF-8 bytes, so any text survives a round trip. Like GLM-4's tokenizer it puts
    `[gMASK]<sop>` in front, pads on the left with `<|endoftext|>`, and carries a chat template.
    """
    bytes_first = [f"<0x{value:02X}>" for value in range(256)]
    vocabulary = {token: index for index, token in enumerate(bytes_first + sorted(set(characters)))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return glm4_tokenizer(tokenizer)


@dataclass(frozen=True)
class PretrainingSettings:
    """Shape and training of glm4-nano. `block` is in tokens; the run is as long as its epochs."""

    hidden_size: int = 256
    intermediate_size: int = 768
    layers: int = 6
    heads: int = 4
    key_value_heads: int = 2
    block: int = 256
    blocks_per_step: int = 16
    epochs: int = 1
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    cooldown_fraction: float = 0.4
    weight_decay: float = 0.05
    seed: int = 20261124
    checkpoint_steps: int = 250


@dataclass(frozen=True)
class PretrainingResult:
    """The base model in float32 with its loss curve, and what it took."""

    model: GlmForCausalLM
    curve: list[dict]
    steps: int
    seconds: float


def vocabulary(documents: Iterable[str]) -> set[str]:
    """The characters that get a token of their own: those of the text, ASCII and common Chinese punctuation."""
    return {*set().union(*documents), *map(chr, range(32, 127)), *"\n（）：；，。、？！“”‘’《》…—·"}


def nano_config(tokenizer: PreTrainedTokenizerFast, settings: PretrainingSettings) -> GlmConfig:
    """GLM-4's architecture at nano size: fused gate_up_proj, half rotary, few key/value heads, untied lm_head."""
    return GlmConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        head_dim=settings.hidden_size // settings.heads,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=stop_ids(tokenizer),
        dtype="bfloat16",
    )


def read_documents(path: Path) -> list[str]:
    """The documents of a pretraining text file, one a line with its line breaks written as `\\n`."""
    if not path.is_file():
        raise ModelError(f"The pretraining text {path} is not there.", "Make it: python -m nano data")
    return [line.replace("\\n", "\n") for line in path.read_text(encoding="utf-8").splitlines()]


def token_blocks(tokenizer: PreTrainedTokenizerFast, documents: list[str], block: int) -> torch.Tensor:
    """All documents as one stream `[gMASK]<sop>text<|endoftext|>...`, cut into rows: shape (blocks, block)."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(documents)
    end = np.array([tokenizer.eos_token_id], dtype=np.int16)
    stream = np.concatenate([part for item in encoded for part in (np.array(item.ids, dtype=np.int16), end)])
    usable = len(stream) // block * block
    return torch.from_numpy(stream[:usable].reshape(-1, block))


def optimizers(model: GlmForCausalLM, settings: PretrainingSettings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, lm_head, norms and biases."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    rate, decay = settings.learning_rate, settings.weight_decay
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_factor(step: int, steps: int, settings: PretrainingSettings) -> float:
    """Part of the learning rate at a step: warm-up, plateau, then a straight line to zero."""
    cooldown = max(1, round(steps * settings.cooldown_fraction))
    return min(1.0, (step + 1) / settings.warmup_steps, (steps - step) / cooldown)


def batch_order(blocks: int, settings: PretrainingSettings) -> torch.Tensor:
    """Indices of the blocks of each step, in another order each epoch: shape (steps, blocks_per_step)."""
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.cat([torch.randperm(blocks, generator=generator) for _ in range(settings.epochs)])
    usable = len(order) // settings.blocks_per_step * settings.blocks_per_step
    return order[:usable].view(-1, settings.blocks_per_step)


def pretrain(
    tokenizer: PreTrainedTokenizerFast,
    blocks: torch.Tensor,
    checkpoint: Path,
    settings: PretrainingSettings,
    report: Callable[[int, int, float, float], None],
    compile_model: bool = False,
) -> PretrainingResult:
    """Train the base model from nothing, or on from `checkpoint`.

    `report(step, steps, loss, seconds)` is called every 50 steps. Weights are float32; products run in bfloat16 where
    the CPU has instructions for it. Raises MachineError where torch has no Muon, ModelError for a checkpoint of other
    settings or another text.
    """
    if not hasattr(torch.optim, "Muon"):
        raise MachineError(f"torch {torch.__version__} has no optimizer Muon.", "Install torch 2.13: make install.")
    torch.manual_seed(settings.seed)
    model = GlmForCausalLM(nano_config(tokenizer, settings)).float()
    model.train()
    training = optimizers(model, settings)
    order = batch_order(len(blocks), settings)
    made_from = {"settings": asdict(settings), "blocks": hashlib.sha256(blocks.numpy().tobytes()).hexdigest()}
    curve: list[dict] = []
    first, seconds_before, seconds = 0, 0.0, 0.0
    if checkpoint.is_file():
        first, seconds_before, curve = load_checkpoint(checkpoint, model, training, made_from)
        seconds = seconds_before
    forward = torch.compile(model) if compile_model else model
    cpu = torch.cpu.get_capabilities()
    in_hardware = any(cpu.get(name) for name in ("amx_bf16", "avx512_bf16", "sve_bf16", "svebf16", "bf16"))
    started, recent = time.monotonic(), []
    for step in range(first, len(order)):
        for optimizer in training:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate_factor(step, len(order), settings)
        batch = blocks[order[step]].long()
        with torch.autocast("cpu", torch.bfloat16, enabled=in_hardware):
            loss = forward(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in training:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        done, seconds = step + 1, seconds_before + time.monotonic() - started
        if done % 50 == 0 or done == len(order):
            curve.append({"step": done, "loss": round(sum(recent) / len(recent), 4)})
            report(done, len(order), curve[-1]["loss"], seconds)
            recent = []
        if done % settings.checkpoint_steps == 0 or done == len(order):
            save_checkpoint(checkpoint, model, training, made_from, done, seconds, curve)
    return PretrainingResult(model.eval(), curve, len(order), seconds)


def save_checkpoint(
    path: Path,
    model: GlmForCausalLM,
    training: list[torch.optim.Optimizer],
    made_from: Mapping[str, Any],
    step: int,
    seconds: float,
    curve: list[dict],
) -> None:
    """Write all that resuming needs, to a new file first, so that a kill leaves the old one intact."""
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in training],
        "made_from": dict(made_from),
        "step": step,
        "seconds": seconds,
        "curve": curve,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_checkpoint(
    path: Path, model: GlmForCausalLM, training: list[torch.optim.Optimizer], made_from: Mapping[str, Any]
) -> tuple[int, float, list[dict]]:
    """Put a checkpoint's state into model and optimizers; return its step, seconds and loss curve.

    Raises ModelError for one of other settings or another text.
    """
    state = torch.load(path, weights_only=True)
    if state["made_from"] != made_from:
        raise ModelError(
            f"{path} was made with other settings or from another text.",
            "Delete it to start from the beginning, or bring those back.",
        )
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(training, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["seconds"], state["curve"]


def save_base_model(model: GlmForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the base model as bfloat16 safetensors with its tokenizer and the three stop ids."""
    folder.mkdir(parents=True, exist_ok=True)
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.generation_config = GenerationConfig(
        eos_token_id=stop_ids(tokenizer), pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    half.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
