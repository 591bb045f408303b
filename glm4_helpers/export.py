"""A trained adapter merged into bfloat16 weights that stand alone, with a certificate that they answer the same.

Training and loading live elsewhere; publishing is left to the hubs' own tools, as the exported README shows.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from . import chat_format, models
from .errors import MachineError, ModelError
from .paths import share_weights
from .profiles import Profile

GIB = 2**30
CERTIFICATE_FILE = "certificate.json"
ANSWER_TOKENS = 8
"""How many tokens of each answer are compared, beside the newline that starts it."""

LARGEST_FACTOR, MEAN_FACTOR = 2.0, 1.25
"""How many times the measured rounding noise the exported logits may be off, at most and on average.

The exported weights are rounded as those that the noise is measured with, so both should be about 1; the average over
all logits varies little.
"""

PROMPTS = (
    "你好。", "你好，告诉我你的名字。", "告诉我1+2等于多少？", "中国的首都是哪里？", "法国的首都是什么？",
    "苹果的英文是什么？", "“大”的反义词是什么？", "请说出三种水果。", "请说出两种动物。", "一年有几个月？",
    "一周有几天？", "把“谢谢”翻译成英文。", "太阳从哪边升起？", "水在多少度结冰？", "写一句关于春天的话。",
    "今天天气怎么样？", "5+7等于多少？", "十减三等于几？", "请用一句话介绍北京。", "什么是人工智能？",
    "地球有几个卫星？", "请列出四种颜色。", "猫和狗有什么不同？", "如何泡一杯茶？", "推荐一本书。",
    "香蕉是什么颜色的？", "请重复：好好学习。", "光的速度快还是声音的速度快？", "长江流入哪个海？", "What is your name?",
    "Name a colour.", "What is 2 + 2?",
)  # fmt: skip
"""32 ordinary prompts that the certificate is made with."""


@dataclass(frozen=True)
class Certificate:
    """The exported model against base and adapter, over `positions` next tokens of `prompts` answers.

    Logit differences are absolute. `noise` is what rounding the merged weights to bfloat16 does, measured with PEFT's
    own merge in memory; `effect` is what the adapter does to the base model. `decided` counts the positions whose best
    two logits are further apart than twice the noise; on all of those the next token has to be the same.
    """

    prompts: int
    positions: int
    dtype: str
    largest_difference: float
    mean_difference: float
    largest_noise: float
    mean_noise: float
    largest_effect: float
    decided: int
    agreeing: int
    same_ids: bool

    @property
    def problems(self) -> list[str]:
        """What is wrong with the exported model, in words; empty where nothing is."""
        found = []
        if not math.isfinite(self.largest_difference):
            found.append("its logits are not all finite")
        if self.largest_difference > LARGEST_FACTOR * self.largest_noise:
            found.append(f"its logits differ by up to {self.largest_difference:.4g}, rounding by {self.largest_noise:.4g}")
        if self.mean_difference > MEAN_FACTOR * self.mean_noise:
            found.append(f"its logits differ by {self.mean_difference:.4g} on average, rounding by {self.mean_noise:.4g}")
        if not self.decided:
            found.append("no next token is decided clearly enough to be compared")
        if self.agreeing < self.decided:
            found.append(f"{self.decided - self.agreeing} of {self.decided} clearly decided next tokens differ")
        if not self.same_ids:
            found.append("its chat template gives other token ids than training did")
        return found

    def __str__(self) -> str:
        return (
            f"{self.prompts} prompts, {self.positions} next tokens, computed in {self.dtype}\n"
            f"largest logit difference {self.largest_difference:.4g} (bfloat16 rounding {self.largest_noise:.4g}, "
            f"the adapter's own effect {self.largest_effect:.4g})\n"
            f"the same next token in {self.agreeing} of {self.decided} clearly decided places; "
            f"the same token ids: {'yes' if self.same_ids else 'no'}"
        )


def export(profile: Profile, adapter_dir: Path, output: Path) -> Certificate:
    """Merge the adapter into the base model, write a folder that stands alone, and certify it.

    One shard is in memory at a time; the certificate then loads one model at a time. The folder appears under its
    name only when it has passed. Raises ModelError for an unfit adapter, an existing folder or a failed certificate,
    MachineError for too little disk space.
    """
    output = Path(output)
    if output.exists():
        raise ModelError(f"{output} exists already; nothing was overwritten.", "Choose another folder or move it away.")
    base = models.base_folder(profile)
    models.check_weights(base, profile)
    config = _merge_settings(profile, adapter_dir)
    _check_disk(output, base, profile)
    staging = output.with_name(f".{output.name}-unfinished")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    merge(profile, adapter_dir, config, staging)
    share_weights(staging)
    _write_settings(profile, staging)
    certificate = certify(profile, adapter_dir, staging)
    (staging / "README.md").write_text(_card(profile, output.name, certificate), encoding="utf-8")
    staging.rename(output)
    return certificate


def merge(profile: Profile, adapter_dir: Path, config: PeftConfig, output: Path) -> None:
    """Write the merged weights in bfloat16, file by file as the base model has them.

    weight + scale x B A in float32, rounded once. Raises ModelError where part of the adapter found no weight.
    """
    base = models.base_folder(profile)
    lora = models.lora_tensors(adapter_dir)
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    unused = {name.rsplit(".", 1)[0] for name in lora}
    for file in models.weight_files(base, profile):
        merged = dict(_merged(file, lora, scale, unused))
        save_file(merged, output / file.name, metadata={"format": "pt"})
        del merged
    if unused:
        raise ModelError(f"The base model has no weight for {sorted(unused)[0]}.", "Choose the adapter's own profile.")
    index = base / "model.safetensors.index.json"
    if index.exists():
        shutil.copy(index, output / index.name)


def _merged(
    file: Path, lora: dict[str, torch.Tensor], scale: float, unused: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as shard:
        for name in shard.keys():
            weight, module = shard.get_tensor(name), name.removesuffix(".weight")
            if f"{module}.lora_A" in lora:
                change = lora[f"{module}.lora_B"].float() @ lora[f"{module}.lora_A"].float()
                weight = weight.float() + scale * change
                unused.discard(module)
            yield name, weight.to(torch.bfloat16)


def certify(profile: Profile, adapter_dir: Path, folder: Path, prompts: Sequence[str] = PROMPTS) -> Certificate:
    """Compare an exported folder with base model and adapter, write CERTIFICATE_FILE into it and return it.

    Raises ModelError, naming all that is wrong, where it does not answer as base and adapter do, and for a folder
    without a model.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"There is no exported model in {folder}.", "Name a folder that export wrote.")
    tokenizer = models.load_tokenizer(profile)
    same_ids = _same_ids(tokenizer, folder, prompts)
    dtype = _compute_dtype(profile)
    sequences, exact, rounded, base = _reference(profile, adapter_dir, tokenizer, prompts, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True)
    exported = _logits(model.to(models.default_device()).eval(), sequences)
    certificate = _certificate(exact, exported, rounded, base, dtype, same_ids)
    text = json.dumps({**asdict(certificate), "problems": certificate.problems}, indent=2, ensure_ascii=False)
    (folder / CERTIFICATE_FILE).write_text(text + "\n", encoding="utf-8")
    if certificate.problems:
        raise ModelError(
            f"The merged model in {folder} is not what was trained: {'; '.join(certificate.problems)}.",
            "Don't use it. Check that base model and adapter belong together, remove the folder and export again.",
        )
    return certificate


def _reference(
    profile: Profile, adapter_dir: Path, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], dtype: torch.dtype
) -> tuple[list[list[int]], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Sequences, and their logits with the adapter, with PEFT's merge rounded to bfloat16, and without the adapter."""
    plain = dataclasses.replace(profile, quantization=None)
    model = models.load_adapter(models.load_base_model(plain, dtype), adapter_dir, plain)
    sequences = [_with_answer(model, _prompt_ids(tokenizer, prompt)) for prompt in prompts]
    exact = _logits(model, sequences)
    with models.adapter_off(model):
        base = _logits(model, sequences)
    merged = model.merge_and_unload()
    with torch.no_grad():
        for weight in merged.parameters():
            weight.copy_(weight.to(torch.bfloat16))
    rounded = _logits(merged, sequences)
    del model, merged
    gc.collect()
    return sequences, exact, rounded, base


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    return chat_format.prompt_ids(tokenizer, [{"role": "user", "content": prompt}])


@torch.no_grad()
def _with_answer(model: torch.nn.Module, ids: list[int]) -> list[int]:
    """The prompt and the start of its greedy answer; stop ids count as any other token."""
    given = torch.tensor([ids], device=model.device)
    out, answer = model(given, use_cache=True, logits_to_keep=1), []
    for _ in range(ANSWER_TOKENS):
        answer.append(int(out.logits[0, -1].argmax()))
        step = torch.tensor([answer[-1:]], device=model.device)
        out = model(step, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
    return ids + answer


@torch.no_grad()
def _logits(model: torch.nn.Module, sequences: Sequence[list[int]]) -> list[torch.Tensor]:
    """For each sequence the logits of the answer's tokens and the one after, (ANSWER_TOKENS + 1, vocabulary)."""
    keep = ANSWER_TOKENS + 1
    given = (torch.tensor([ids], device=model.device) for ids in sequences)
    return [model(ids, use_cache=False, logits_to_keep=keep).logits[0].float().cpu() for ids in given]


def _certificate(
    exact: list[torch.Tensor],
    exported: list[torch.Tensor],
    rounded: list[torch.Tensor],
    base: list[torch.Tensor],
    dtype: torch.dtype,
    same_ids: bool,
) -> Certificate:
    wanted, found, noisy, plain = (torch.cat(logits) for logits in (exact, exported, rounded, base))
    difference, noise = (found - wanted).abs(), (noisy - wanted).abs()
    best = wanted.topk(2, dim=-1).values
    decided = best[:, 0] - best[:, 1] > 2 * noise.max()
    agreeing = decided & (wanted.argmax(-1) == found.argmax(-1))
    return Certificate(
        prompts=len(exact),
        positions=len(wanted),
        dtype=str(dtype).removeprefix("torch."),
        largest_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        largest_noise=float(noise.max()),
        mean_noise=float(noise.mean()),
        largest_effect=float((plain - wanted).abs().max()),
        decided=int(decided.sum()),
        agreeing=int(agreeing.sum()),
        same_ids=same_ids,
    )


def _same_ids(tokenizer: PreTrainedTokenizerBase, folder: Path, prompts: Sequence[str]) -> bool:
    """Whether the exported folder alone turns ordinary prompts into the ids of training."""
    alone = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        given = alone.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        if list(given["input_ids"]) != chat_format.prompt_ids(tokenizer, messages):
            return False
    return True


def _compute_dtype(profile: Profile) -> torch.dtype:
    """float32 where a model of that size takes at most half of the memory, else bfloat16."""
    import psutil

    size = sum(file.stat().st_size for file in models.weight_files(models.base_folder(profile), profile))
    gpu = models.default_device()
    free = torch.cuda.mem_get_info(gpu)[0] if gpu.type == "cuda" else psutil.virtual_memory().available
    return torch.float32 if 2 * size < free / 2 else torch.bfloat16


def _merge_settings(profile: Profile, adapter_dir: Path) -> PeftConfig:
    """The adapter's settings, after the checks that every load makes. The model's shapes alone are enough for them."""
    models.check_adapter(models.meta_model(profile), adapter_dir, profile)
    config = PeftConfig.from_pretrained(adapter_dir)
    special = [
        name
        for name in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias")
        if getattr(config, name, None)
    ]
    if special or config.bias != "none":
        raise ModelError(
            f"The adapter uses {', '.join(special) or 'bias'}, which can't be merged here.",
            "Merge it with PEFT's own merge_and_unload.",
        )
    return config


def _check_disk(output: Path, base: Path, profile: Profile) -> None:
    existing = next(parent for parent in output.resolve().parents if parent.exists())
    needed = sum(file.stat().st_size for file in models.weight_files(base, profile))
    free = shutil.disk_usage(existing).free
    if needed * 1.05 > free:
        raise MachineError(
            f"The export needs {needed / GIB:.1f} GiB of disk space; {free / GIB:.1f} GiB are free in {existing}.",
            "Free some space, or give a folder on another disk with --output.",
        )


def _write_settings(profile: Profile, folder: Path) -> None:
    """Config, generation config with the three stop ids, tokenizer and chat template."""
    tokenizer = models.load_tokenizer(profile)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = chat_format.CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    model = models.meta_model(profile)
    models.set_stop_ids(model, tokenizer)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.update(architectures=[profile.architecture], dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _card(profile: Profile, name: str, certificate: Certificate) -> str:
    stops = json.dumps(chat_format.stop_ids(models.load_tokenizer(profile)))
    return f"""# {name}

{profile.base_model} with a LoRA adapter merged in, in bfloat16. `{CERTIFICATE_FILE}` says how it was compared with
base model and adapter:

    {str(certificate).replace(chr(10), chr(10) + "    ")}

## Serving

    transformers serve --port 8000
    curl http://localhost:8000/v1/chat/completions -H "Content-Type: application/json" \\
      -d '{{"model": "PATH/TO/{name}", "messages": [{{"role": "user", "content": "你好"}}], "max_tokens": 100}}'

vLLM reads the stop ids from generation_config.json; where a client overrides them, they are {stops}:

    vllm serve PATH/TO/{name} --dtype bfloat16
    # in a request: "stop_token_ids": {stops}

## The adapter itself

It needs no merging for use with PEFT, and is a few MB to publish:

    from peft import AutoPeftModelForCausalLM
    model = AutoPeftModelForCausalLM.from_pretrained("PATH/TO/ADAPTER", dtype="bfloat16")

    hf upload YOUR_NAME/{name} PATH/TO/ADAPTER
"""
