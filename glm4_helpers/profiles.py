"""Profiles: a model, its data and its training settings under one name.

Everything special about a model is in its entry here, so adding a model means adding an entry. This module holds
settings only: it loads nothing and checks no path. Data and model paths are relative to the course folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .support.errors import SettingError

DEFAULT = "glm4-nano"


class _Rule(NamedTuple):
    """What a setting may be: as a test, and in the words of an error's fix."""

    fits: Callable[[Any], bool]
    words: str


def _number(words: str, fits: Callable[[Any], bool], kind: Any = (int, float)) -> _Rule:
    return _Rule(lambda value: isinstance(value, kind) and not isinstance(value, bool) and fits(value), words)


def _or_nothing(rule: _Rule) -> _Rule:
    return _Rule(lambda value: value is None or rule.fits(value), f"{rule.words}, or null")


def _one_of(*choices: str, why: str = "") -> _Rule:
    return _Rule(lambda value: isinstance(value, str) and value in choices, f"one of {', '.join(choices)}{why}")


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


_COUNT = _number("a whole number of at least 1", lambda value: value >= 1, int)
_COUNT_FROM_0 = _number("a whole number of at least 0", lambda value: value >= 0, int)
_SEED = _number(f"a whole number from 0 to {2**32 - 1}", lambda value: 0 <= value < 2**32, int)
_FROM_0 = _number("a number of at least 0", lambda value: 0 <= value < math.inf)
_ABOVE_0 = _number("a number above 0", lambda value: 0 < value < math.inf)
_FRACTION = _number("a number from 0 up to, but not including, 1", lambda value: 0 <= value < 1)
_SWITCH = _Rule(lambda value: isinstance(value, bool), "true or false")
_TEXT = _Rule(lambda value: isinstance(value, str), "text")
_TEXTS = _Rule(_are_texts, "a list of texts, such as [one, another]")
_SOURCES = _Rule(
    lambda value: isinstance(value, str) or (_are_texts(value) and len(value) > 0),
    "text, or a list such as [a.csv, b.jsonl]",
)
_NAMES = _Rule(
    lambda value: isinstance(value, Mapping) and _are_texts([*value, *value.values()]),
    "names such as {问题: instruction, 答案: output}",
)
_TARGETS = _Rule(
    lambda value: _are_texts(value) and len({*value}) == len(value) > 0,
    "a list of at least one name, each of them once, as in --set 'lora.target_modules=[q_proj, v_proj]'",
)


def _setting(rule: _Rule, default: Any = dataclasses.MISSING, changes_weights: bool = True) -> Any:
    """A field that a user can set to whatever the rule allows. Fields without a rule are facts about the model.

    `changes_weights` False means that a finished adapter stays valid when the setting changes.
    """
    return field(default=default, metadata={"rule": rule, "changes_weights": changes_weights})


@dataclass(frozen=True)
class LoraSettings:
    """LoRA's rank `r`, its `alpha`, its dropout and the names of the linear layers that get an adapter.

    A layer's output grows by (alpha / r) B A x, where A is `(r, in)` and B `(out, r)` (Hu et al. 2021, section 4.1).
    """

    r: int = _setting(_COUNT)
    alpha: int = _setting(_COUNT)
    dropout: float = _setting(_FRACTION)
    target_modules: tuple[str, ...] = _setting(_TARGETS)


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of one training run. Batch sizes are rows per device, `max_length` is tokens per row.

    `warmup_fraction` is a share of all optimizer steps. `padding_free` joins the rows of a batch into one sequence, in
    which no row sees another, instead of padding each to the longest: steps and losses stay the same with fewer tokens.
    It pays for short rows of different lengths. In long sequences it costs more than padding does, since attention is
    computed between the rows and then masked; so keep evaluation batches to about 16 short rows.
    `early_stopping_patience` ends the run after that many evaluations without a lower dev loss; None never ends it.
    """

    epochs: int | float = _setting(_ABOVE_0)
    per_device_batch_size: int = _setting(_COUNT)
    evaluation_batch_size: int = _setting(_COUNT)
    gradient_accumulation_steps: int = _setting(_COUNT)
    learning_rate: float = _setting(_ABOVE_0)
    # The schedules of transformers that need no settings of their own.
    lr_scheduler: str = _setting(
        _one_of("linear", "cosine", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt")
    )
    warmup_fraction: float = _setting(_FRACTION)
    weight_decay: float = _setting(_FROM_0)
    max_length: int = _setting(_COUNT)
    evaluations_per_run: int = _setting(_COUNT_FROM_0)
    seed: int = _setting(_SEED)
    gradient_checkpointing: bool = _setting(_SWITCH)
    padding_free: bool = _setting(_SWITCH, False)
    early_stopping_patience: int | None = _setting(_or_nothing(_COUNT), None)


@dataclass(frozen=True)
class Needs:
    """What training takes, in GiB: `memory_gib` of RAM, `gpu_memory_gib` on GPUs, `disk_gib` on disk.

    `gpu_memory_gib` is for one GPU, and 0 where a CPU is enough.
    """

    memory_gib: float
    gpu_memory_gib: float
    disk_gib: float


@dataclass(frozen=True)
class Profile:
    """A model, its data and its training settings. `lora` None means full fine-tuning.

    `base_model`, `train_data`, `dev_data` and `test_data` are paths below the course folder; `train_data` may also be a
    hub id, or a list of both. Where `dev_data` is None, `dev_fraction` of the rows is held out instead. `columns` maps
    other column names to the known ones, such as {"问题": "instruction", "答案": "output"}. `skip_bad_rows` leaves out
    rows that can't be used; otherwise they are an error. `answer_batch_size` is the number of rows answered at a time
    when a model is scored. `chat_model` is the path of the makers' chat model, which is scored too if it is there.

    The last fields are known before a download. `shape` holds the arguments of the model's config
    (`AutoConfig.for_model`), or None where the model ships with the course. `needs` None is worked out from `shape`.
    `old_names` are repositories in an old format; their successors have the same name with `-hf`.
    """

    name: str
    title: str = _setting(_TEXT, changes_weights=False)
    base_model: str = _setting(_TEXT)
    hub_id: str | None = _setting(_or_nothing(_TEXT), changes_weights=False)
    modelscope_id: str | None = _setting(_or_nothing(_TEXT), changes_weights=False)
    architecture: str = _setting(_TEXT)
    dtype: str = _setting(_one_of("auto", "float32", "bfloat16", why=" (float16 gives NaN on GLM-4-9B)"))
    quantization: str | None = _setting(_or_nothing(_one_of("nf4")))
    lora: LoraSettings | None = _setting(
        _or_nothing(_Rule(lambda value: isinstance(value, LoraSettings), "one setting at a time, as in lora.r=8"))
    )
    training: TrainingSettings = _setting(
        _Rule(lambda value: isinstance(value, TrainingSettings), "one setting at a time, as in training.epochs=1")
    )
    # Runs compare rows by their fingerprint, not by where they are from.
    train_data: str | tuple[str, ...] = _setting(_SOURCES, changes_weights=False)
    dev_data: str | None = _setting(_or_nothing(_TEXT), changes_weights=False)
    test_data: str | None = _setting(_or_nothing(_TEXT), changes_weights=False)
    dev_fraction: float = _setting(_FRACTION)
    sample_prompts: tuple[str, ...] = _setting(_TEXTS, changes_weights=False)
    system_prompt: str | None = _setting(_or_nothing(_TEXT), changes_weights=False)
    max_new_tokens: int = _setting(_COUNT, changes_weights=False)
    terminator: str = _setting(_TEXT, "<|endoftext|>")
    answer_batch_size: int = _setting(_COUNT, 32, changes_weights=False)
    chat_model: str | None = _setting(_or_nothing(_TEXT), None, changes_weights=False)
    columns: Mapping[str, str] | None = _setting(_or_nothing(_NAMES), None, changes_weights=False)
    skip_bad_rows: bool = _setting(_SWITCH, False, changes_weights=False)
    shape: Mapping[str, Any] | None = None
    needs: Needs | None = None
    old_names: tuple[str, ...] = ()


_ATTENTION = ("q_proj", "k_proj", "v_proj")
_PROMPTS = ("你好，告诉我你的名字。", "告诉我1+2等于多少？")
_NANO = Profile(
    name="glm4-nano",
    title="glm4-nano, shipped with the course: minutes on a CPU",
    base_model="weights/glm4-nano",
    hub_id=None,
    modelscope_id=None,
    architecture="GlmForCausalLM",
    dtype="auto",
    quantization=None,
    lora=LoraSettings(r=8, alpha=32, dropout=0.0, target_modules=_ATTENTION),
    training=TrainingSettings(
        epochs=3,
        per_device_batch_size=8,
        evaluation_batch_size=16,
        gradient_accumulation_steps=1,
        learning_rate=2e-3,
        lr_scheduler="linear",
        warmup_fraction=0.02,
        weight_decay=0.0,
        max_length=512,
        evaluations_per_run=3,
        seed=42,
        gradient_checkpointing=False,
        padding_free=True,
    ),
    train_data="data/train.json",
    dev_data="data/dev",
    test_data="data/test",
    dev_fraction=0.0,
    sample_prompts=_PROMPTS,
    system_prompt=None,
    max_new_tokens=200,
    needs=Needs(memory_gib=3, gpu_memory_gib=0, disk_gib=1),
)
_SHAPE_9B = {
    "model_type": "glm",
    "vocab_size": 151_552,
    "hidden_size": 4096,
    "intermediate_size": 13_696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "attention_bias": True,
    "tie_word_embeddings": False,
}
# The published recipe: Alpaca-GPT4 Chinese, 5 % held out, batch 2 (4 for evaluation), 5e-4 with linear decay,
# 512 tokens, an evaluation every tenth of the run. Two settings are ours: gradient checkpointing keeps the run below
# 24 GB, and padding_free saves a quarter of the tokens at the loss and gradients of padded rows
# (tests/test_padding_free.py).
_LORA_9B = Profile(
    name="glm-4-9b-lora",
    title="GLM-4-9B, LoRA in bfloat16: one GPU of 24 GB or more",
    base_model="weights/glm-4-9b-hf",
    hub_id="zai-org/glm-4-9b-hf",
    modelscope_id="ZhipuAI/glm-4-9b-hf",
    architecture="GlmForCausalLM",
    dtype="bfloat16",
    quantization=None,
    lora=LoraSettings(r=8, alpha=32, dropout=0.1, target_modules=_ATTENTION),
    training=TrainingSettings(
        epochs=3,
        per_device_batch_size=2,
        evaluation_batch_size=4,
        gradient_accumulation_steps=1,
        learning_rate=5e-4,
        lr_scheduler="linear",
        warmup_fraction=0.0,
        weight_decay=0.0,
        max_length=512,
        evaluations_per_run=10,
        seed=42,
        gradient_checkpointing=True,
        padding_free=True,
    ),
    train_data="llamafactory/alpaca_gpt4_zh",
    dev_data=None,
    test_data=None,
    dev_fraction=0.05,
    sample_prompts=_PROMPTS,
    system_prompt=None,
    max_new_tokens=256,
    shape=_SHAPE_9B,
    chat_model="weights/glm-4-9b-chat-hf",
    old_names=("glm-4-9b", "glm-4-9b-chat", "glm-4-9b-chat-1m"),
)
_PROFILES = (
    _NANO,
    dataclasses.replace(
        _LORA_9B,
        name="glm-edge-1.5b",
        title="GLM-Edge-1.5B-Chat, LoRA: a small relative with real weights",
        base_model="weights/glm-edge-1.5b-chat",
        hub_id="zai-org/glm-edge-1.5b-chat",
        modelscope_id=None,
        shape={  # 1,593,427,968 parameters
            "model_type": "glm",
            "vocab_size": 59_264,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "partial_rotary_factor": 1.0,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
            "pad_token_id": 59_246,
            "eos_token_id": [59_246, 59_253, 59_255],
        },
        chat_model=None,
        old_names=(),
    ),
    dataclasses.replace(
        _LORA_9B,
        name="glm-4-9b-qlora",
        title="GLM-4-9B, LoRA on weights in 4 bits: one smaller GPU",
        quantization="nf4",
    ),
    _LORA_9B,
    dataclasses.replace(
        _LORA_9B,
        name="glm-4-9b-0414",
        title="GLM-4-9B-0414, LoRA in bfloat16: the refresh of April 2025",
        base_model="weights/GLM-4-9B-0414",
        hub_id="zai-org/GLM-4-9B-0414",
        modelscope_id=None,
        architecture="Glm4ForCausalLM",
        shape={**_SHAPE_9B, "model_type": "glm4"},
        chat_model=None,
        old_names=(),
    ),
    dataclasses.replace(
        _LORA_9B,
        name="glm-4-9b-full",
        title="GLM-4-9B, full fine-tuning: several GPUs, from the command line",
        lora=None,
        training=dataclasses.replace(_LORA_9B.training, learning_rate=5e-5),
    ),
)


def profile_names() -> tuple[str, ...]:
    """The names that `get_profile` knows, the default first."""
    return tuple(profile.name for profile in _PROFILES)


def get_profile(name: str | None = None, **overrides: Any) -> Profile:
    """The profile called `name` (None: the variable GLM4_PROFILE, else glm4-nano), with some settings changed.

    Overrides are dotted, `**{"training.epochs": 1}`, or nested, `training={"epochs": 1}`.
    Raises SettingError for a wrong value and for an unknown name or key, with the nearest known one.
    Shown in 02, 2.1.
    """
    chosen = str(name or os.environ.get("GLM4_PROFILE") or DEFAULT)
    known = {profile.name: profile for profile in _PROFILES}
    if chosen not in known:
        raise SettingError(f"There is no profile {chosen!r}.", _suggestion(chosen, known))
    profile = known[chosen]
    for key, value in flat_settings(overrides).items():
        profile = _replaced(profile, key, value)
    return profile


def unchanged(profile: Profile) -> Profile:
    """The profile of that name with its original settings; the profile itself if its name is not one of ours."""
    return next((known for known in _PROFILES if known.name == profile.name), profile)


def profile_settings(profile: Profile) -> dict[str, Any]:
    """The profile's name and settings as a dict that JSON can hold: nested like the dataclasses, tuples as lists."""
    settings = json.loads(json.dumps(dataclasses.asdict(profile)))
    return {key: value for key, value in settings.items() if key in ("name", *_SETTINGS)}


def changes_weights(key: str) -> bool:
    """Whether another value of the setting with this dotted key gives other trained weights."""
    setting = _SETTINGS.get(key) or _SETTINGS.get(key.partition(".")[0])
    return setting is None or setting.metadata["changes_weights"]


def flat_settings(overrides: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in overrides.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" != "columns":
            flat.update(flat_settings(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


_SETTINGS = {
    prefix + setting.name: setting
    for prefix, owner in (("", Profile), ("lora.", LoraSettings), ("training.", TrainingSettings))
    for setting in dataclasses.fields(owner)
    if "rule" in setting.metadata
}
"""The field of each setting under its dotted key."""


def _replaced(profile: Profile, key: str, value: Any) -> Profile:
    """`profile` with the setting at the dotted `key` changed. Raises SettingError."""
    if key not in _SETTINGS:
        raise SettingError(f"There is no setting {key!r}.", _suggestion(key, _SETTINGS))
    group, _, name = key.rpartition(".")
    settings = getattr(profile, group) if group else profile
    if settings is None:
        raise SettingError(
            f"{key} can't be set: profile {profile.name} trains all weights, without LoRA.",
            f"Remove {key}, or take a LoRA profile such as {DEFAULT}.",
        )
    rule = _SETTINGS[key].metadata["rule"]
    if not rule.fits(value):
        raise SettingError(f"{key} can't be {value!r}.", f"Give {rule.words}.")
    changed = dataclasses.replace(settings, **{name: tuple(value) if isinstance(value, list) else value})
    return dataclasses.replace(profile, **{group: changed}) if group else changed


def _suggestion(unknown: str, known: Iterable[str]) -> str:
    """The nearest known name, by all of it or by the part after the dot; else those of the same group."""
    known = [name for name in known if name not in ("lora", "training")]
    group, _, last_part = unknown.rpartition(".")
    known = [name for name in known if group and name.startswith(f"{group}.")] or known
    last_parts = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(unknown, known, 1, 0.8)
    near += [last_parts[part] for part in difflib.get_close_matches(last_part, last_parts, 1)]
    return f"Did you mean {near[0]}?" if near else f"Use one of {', '.join(known)}."
