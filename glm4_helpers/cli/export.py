"""A trained adapter merged into bfloat16 weights that stand alone and that other tools read, with a certificate.

PEFT merges and Transformers saves. Training and loading live elsewhere; publishing is left to the hubs' own tools, as
the exported README shows.
"""

from __future__ import annotations

import dataclasses
import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from .. import chat_format, models
from ..checks import adapters, chat_template, shapes, weights
from ..machine import gpus
from ..profiles import Profile
from ..support.errors import ModelError
from ..support.files import GIB, read_json, require_disk, write_json
from ..support.paths import share_weights

CERTIFICATE_FILE = "certificate.json"
ANSWER_TOKENS = 8
"""How many tokens of each answer are compared, besides the newline that starts it."""
LEAST_AGREEMENT = 0.9
"""The least share of next tokens that have to be the same with the adapter and in the exported model.

Weights in bfloat16 have no room for all of the adapter's change, so tokens that are almost as likely may change places.
"""
TRIED = "transformers 4.57.6 and 5.23.0"
"""What read an exported folder with the same greedy answers; test_export does it again."""
PROMPTS = (
    "你好。",
    "你好，告诉我你的名字。",
    "告诉我1+2等于多少？",
    "中国的首都是哪里？",
    "法国的首都是什么？",
    "苹果的英文是什么？",
    "“大”的反义词是什么？",
    "请说出三种水果。",
    "请说出两种动物。",
    "一年有几个月？",
    "一周有几天？",
    "把“谢谢”翻译成英文。",
    "太阳从哪边升起？",
    "水在多少度结冰？",
    "写一句关于春天的话。",
    "今天天气怎么样？",
    "5+7等于多少？",
    "十减三等于几？",
    "请用一句话介绍北京。",
    "什么是人工智能？",
    "地球有几个卫星？",
    "请列出四种颜色。",
    "猫和狗有什么不同？",
    "如何泡一杯茶？",
    "推荐一本书。",
    "香蕉是什么颜色的？",
    "请重复：好好学习。",
    "光的速度快还是声音的速度快？",
    "长江流入哪个海？",
    "What is your name?",
    "Name a colour.",
    "What is 2 + 2?",
)
"""32 ordinary prompts that the certificate is made with."""


@dataclass(frozen=True)
class Certificate:
    """An exported folder against base model and adapter.

    `tensors` counts the weights in its files, `identical` those that equal PEFT's merge to the bit; `different` names
    those that are further off than a merge on another kind of device explains. `agreeing` of `next_tokens` likeliest
    next tokens, in the answers to `prompts`, are those of base model and adapter; without the adapter
    `agreeing_without` are.
    """

    prompts: int
    device: str
    tensors: int
    identical: int
    different: tuple[str, ...]
    next_tokens: int
    agreeing: int
    agreeing_without: int
    same_ids: bool

    @property
    def problems(self) -> list[str]:
        """What is wrong with the exported model, in words; empty where nothing is."""
        found = []
        if self.different:
            found.append(f"{len(self.different)} tensors are not those of the merge, such as {self.different[0]}")
        if self.agreeing < LEAST_AGREEMENT * self.next_tokens:
            found.append(f"{self.next_tokens - self.agreeing} of {self.next_tokens} next tokens differ")
        if not self.same_ids:
            found.append("its chat template gives other token ids than training did")
        return found

    def __str__(self) -> str:
        return (
            f"{self.identical} of {self.tensors} tensors equal the merge of base model and adapter to the bit\n"
            f"the same next token in {self.agreeing} of {self.next_tokens} places of {self.prompts} answers "
            f"(without the adapter in {self.agreeing_without}), computed in bfloat16 on {self.device}\n"
            f"the same token ids: {'yes' if self.same_ids else 'no'}"
        )


def export(profile: Profile, adapter_dir: Path, output: Path) -> Certificate:
    """Merge the adapter into the base model, write a folder that stands alone, and certify it.

    One model is in memory at a time. The folder appears under its name only when it has passed. Raises ModelError for
    an unfit adapter, an existing folder or a failed certificate, MachineError for too little disk space.
    """
    output = Path(output)
    if output.exists():
        raise ModelError(f"{output} exists already; nothing was overwritten.", "Choose another folder or move it away.")
    _check_parts(profile, adapter_dir)
    size = sum(file.stat().st_size for file in weights.weight_files(weights.base_folder(profile), profile))
    require_disk(output, size * 1.05, "The export", "Free some space, or give a folder on another disk with --output.")
    staging = output.with_name(f".{output.name}-unfinished")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    certificate = _merge_and_certify(profile, adapter_dir, staging, write=True)
    (staging / "README.md").write_text(_card(profile, output.name, certificate), encoding="utf-8")
    staging.rename(output)
    return certificate


def certify(profile: Profile, adapter_dir: Path, folder: Path) -> Certificate:
    """Compare an exported folder with base model and adapter again, write CERTIFICATE_FILE into it and return it.

    Raises ModelError, naming all that is wrong, where it is not their merge, and for a folder without a model.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"There is no exported model in {folder}.", "Name a folder that export wrote.")
    _check_parts(profile, adapter_dir)
    return _merge_and_certify(profile, adapter_dir, folder, write=False)


def merge_device(profile: Profile) -> tuple[torch.device, str]:
    """Where the whole model is merged and asked in bfloat16, and why there, in words.

    The GPU where it has bfloat16, and 2 bytes a weight and 1 GiB for the answers are free on it; else the CPU. A QLoRA
    adapter may well have been trained on a card that the model in 16 bits does not fit on.
    """
    gpu = gpus.default_device()
    if gpu.type != "cuda":
        return gpu, "there is no GPU"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.device("cpu"), "the GPU has no bfloat16"
    needed = 2 * shapes.meta_model(profile).num_parameters() + GIB
    free = torch.cuda.mem_get_info(gpu)[0]
    sizes = f"{needed / GIB:.1f} GiB are needed, {free / GIB:.1f} GiB are free on the GPU"
    return (gpu if needed <= free else torch.device("cpu")), sizes


def _merge_and_certify(profile: Profile, adapter_dir: Path, folder: Path, write: bool) -> Certificate:
    """Merge in memory, write the result to the folder (or take what is there) and compare the two."""
    device, why = merge_device(profile)
    print(f"Merging and comparing on {device.type}: {why}.", flush=True)
    tokenizer = models.load_tokenizer(profile)
    plain = dataclasses.replace(profile, quantization=None)
    model = models.load_adapter(models.load_base_model(plain, torch.bfloat16, device), adapter_dir, plain)
    sequences = [_with_answer(model, _prompt_ids(tokenizer, prompt)) for prompt in PROMPTS]
    adapted = _next_tokens(model, sequences)
    with models.adapter_off(model):
        base = _next_tokens(model, sequences)
    # Not safe_merge, which rounds to bfloat16 twice.
    model = model.merge_and_unload()
    if write:
        _write(model, tokenizer, folder)
    tensors, identical, different = _compare_tensors(folder, model.state_dict())
    del model
    gc.collect()
    torch.cuda.empty_cache()  # nothing where there is no GPU
    exported, loaded = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # both are problems, named below
    )
    found = _next_tokens(exported.to(device).eval(), sequences)
    certificate = Certificate(
        prompts=len(PROMPTS),
        device=device.type,
        tensors=tensors,
        identical=identical,
        different=tuple(sorted({*different, *loaded["missing_keys"]})),
        next_tokens=len(adapted),
        agreeing=sum(map(int.__eq__, found, adapted)),
        agreeing_without=sum(map(int.__eq__, base, adapted)),
        same_ids=_same_ids(tokenizer, folder),
    )
    write_json(folder / CERTIFICATE_FILE, {**asdict(certificate), "problems": certificate.problems})
    if certificate.problems:
        raise ModelError(
            f"The merged model in {folder} is not what was trained: {'; '.join(certificate.problems)}.",
            "Don't use it. Check that base model and adapter belong together, remove the folder and export again.",
        )
    return certificate


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    return chat_format.prompt_ids(tokenizer, [{"role": "user", "content": prompt}])


@torch.no_grad()
def _with_answer(model: nn.Module, ids: list[int]) -> list[int]:
    """The prompt and the start of an answer to it, without a stop id in it."""
    given = torch.tensor([ids], device=model.device)
    length = {"min_new_tokens": ANSWER_TOKENS, "max_new_tokens": ANSWER_TOKENS}
    return model.generate(input_ids=given, attention_mask=torch.ones_like(given), do_sample=False, **length)[0].tolist()


@torch.no_grad()
def _next_tokens(model: nn.Module, sequences: Sequence[list[int]]) -> list[int]:
    """The likeliest next token at each place of the answers, ANSWER_TOKENS + 1 for each sequence."""
    found: list[int] = []
    for ids in sequences:
        given = torch.tensor([ids], device=model.device)
        logits = model(given, use_cache=False, logits_to_keep=ANSWER_TOKENS + 1).logits[0]  # (tokens, vocabulary)
        found += logits.argmax(-1).tolist()
    return found


def _compare_tensors(folder: Path, merged: Mapping[str, torch.Tensor]) -> tuple[int, int, list[str]]:
    """How many tensors the folder's files hold, how many equal the merge to the bit, and which are off."""
    count, identical, different = 0, 0, []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as saved:
            for name in saved.keys():
                count += 1
                found, wanted = saved.get_tensor(name), merged.get(name)
                if wanted is not None and found.dtype == wanted.dtype and torch.equal(found, wanted.cpu()):
                    identical += 1
                elif wanted is None or not _rounded_elsewhere(found, wanted.cpu()):
                    different.append(name)
    return count, identical, different


def _rounded_elsewhere(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether the difference is that of another device's merge: few entries, each off by one step of bfloat16."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    few = (found != wanted).float().mean() < 1e-3
    return bool(few) and torch.allclose(found.float(), wanted.float(), rtol=2**-7, atol=1e-6)


def _same_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether the exported folder alone turns the prompts into the ids of training."""
    alone = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        given = alone.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        if list(given["input_ids"]) != chat_format.prompt_ids(tokenizer, messages):
            return False
    return True


def _check_parts(profile: Profile, adapter_dir: Path) -> None:
    """Refuse damaged weights and an unfit adapter before the slow load. The model's shapes alone are enough for it."""
    weights.check_weights(weights.base_folder(profile), profile)
    adapters.check_adapter(shapes.meta_model(profile), adapter_dir, profile)


# Files that other tools read


def _write(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="5GB")
    share_weights(folder)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | _older_names(config))
    if tokenizer.chat_template is None:
        tokenizer.chat_template = chat_template.CHAT_TEMPLATE
    save_tokenizer(tokenizer, folder)


def _older_names(config: Mapping[str, object]) -> dict[str, object]:
    """Settings of a GLM's config under the names that other tools know.

    transformers 4 takes its own defaults (half of each head rotary) where the first two are absent. llama.cpp's
    converter (conversion/chatglm.py) takes the second, and the original GLM-4's names for the rest: without these
    1e-5, the hidden size and a theta of 10,000.
    """
    rope = config["rope_parameters"]
    return {
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),  # as transformers 5 reads it
        "layernorm_epsilon": config["rms_norm_eps"],
        "seq_length": config["max_position_embeddings"],
        "rope_ratio": rope["rope_theta"] / 10_000,
    }


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer as transformers 4 and 5 both read it, without what transformers 5 notes about its loading."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = read_json(file)
    for name in ("backend", "is_local", "local_files_only"):
        settings.pop(name, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # version 5's name for it is unknown to version 4
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens", [])
    write_json(file, settings)


def _card(profile: Profile, name: str, certificate: Certificate) -> str:
    stops = chat_template.stop_ids(models.load_tokenizer(profile))
    base = profile.hub_id or f"PATH/TO/CLONE/{profile.base_model}"
    return f"""# {name}

{profile.base_model} with a LoRA adapter merged in, in bfloat16, written with transformers {transformers.__version__}.
`{CERTIFICATE_FILE}` says how it was compared with base model and adapter:

    {str(certificate).replace(chr(10), chr(10) + "    ")}

## Which tools read it

Tried on glm4-nano, with the same answers: {TRIED}. vLLM and llama.cpp were not run. config.json holds the names that
llama.cpp's converter asks for (read in its source), besides those of transformers.

## Serving

    transformers serve --port 8000
    curl http://localhost:8000/v1/chat/completions -H "Content-Type: application/json" \\
      -d '{{"model": "PATH/TO/{name}", "messages": [{{"role": "user", "content": "你好"}}], "max_tokens": 100}}'

vLLM reads the stop ids from generation_config.json; where a client overrides them, they are {stops}:

    vllm serve PATH/TO/{name} --dtype bfloat16
    # in a request: "stop_token_ids": {stops}

## The adapter itself

It needs no merging for use with PEFT, and is a few MB to publish. Tokenizer and chat template come from this folder:

    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    base = AutoModelForCausalLM.from_pretrained("{base}", dtype="bfloat16")
    model = PeftModel.from_pretrained(base, "PATH/TO/ADAPTER")
    tokenizer = AutoTokenizer.from_pretrained("PATH/TO/{name}")

    hf upload YOUR_NAME/{name} PATH/TO/ADAPTER
"""
