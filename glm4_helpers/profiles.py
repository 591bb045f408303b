"""Profiles: which model, which data, and the settings to train it with.

Settings only: nothing is loaded, and no path is checked. Data and model paths are relative to the course folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Mapping

from .errors import SettingError

DEFAULT = "glm4-nano"


@dataclass(frozen=True)
class LoraSettings:
    """LoRA: rank, scale and the names of the linear layers that get an adapter."""

    r: int
    alpha: int
    dropout: float
    target_modules: tuple[str, ...]


@dataclass(frozen=True)
class TrainingSettings:
    """What SFT is run with. Batch sizes are rows per device; max_length is in tokens.

    ``padding_free`` joins the rows of a batch to one sequence in which no row sees another, instead of padding all to
    the longest: the same steps and losses with fewer tokens. It pays for short rows of unequal length in batches of
    several; in long ones attention, which is computed between rows and then masked, costs more than the padding. That
    also holds for evaluation, whose batches should then be no larger than about 16 short rows.
    ``early_stopping_patience`` ends training after so many evaluations without a lower dev loss; None never does.
    """

    epochs: int | float
    per_device_batch_size: int
    evaluation_batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    lr_scheduler: str
    warmup_fraction: float
    weight_decay: float
    max_length: int
    evaluations_per_run: int
    seed: int
    gradient_checkpointing: bool
    padding_free: bool = False
    early_stopping_patience: int | None = None


@dataclass(frozen=True)
class Profile:
    """One model with its data and settings. ``lora`` None means full fine-tuning.

    ``base_model``, ``train_data``, ``dev_data`` and ``test_data`` are paths below the course folder; ``train_data``
    may also be a hub id, or a list of both. Where ``dev_data`` is None, ``dev_fraction`` of the rows is held
    out instead. ``columns`` says what columns of other names mean, such as {"问题": "instruction", "答案": "output"};
    ``skip_bad_rows`` leaves out rows that can't be used, where else they are an error.
    """

    name: str
    title: str
    base_model: str
    hub_id: str | None
    modelscope_id: str | None
    architecture: str
    dtype: str
    quantization: str | None
    lora: LoraSettings | None
    training: TrainingSettings
    train_data: str | tuple[str, ...]
    dev_data: str | None
    test_data: str | None
    dev_fraction: float
    sample_prompts: tuple[str, ...]
    system_prompt: str | None
    max_new_tokens: int
    terminator: str = "<|endoftext|>"
    columns: dict[str, str] | None = None
    skip_bad_rows: bool = False


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
)

# The published recipe: Alpaca-GPT4 Chinese, 5 % held out, batch 2 (4 for evaluation), 5e-4 with linear decay,
# 512 tokens, a look at every tenth of the run. Gradient checkpointing is ours: it keeps the run below 24 GB.
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
    ),
    train_data="llamafactory/alpaca_gpt4_zh",
    dev_data=None,
    test_data=None,
    dev_fraction=0.05,
    sample_prompts=_PROMPTS,
    system_prompt=None,
    max_new_tokens=256,
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
    """Names that ``get_profile`` knows, the default first."""
    return tuple(profile.name for profile in _PROFILES)


def get_profile(name: str | None = None, **overrides: Any) -> Profile:
    """The profile called ``name`` (None: the variable GLM4_PROFILE, else glm4-nano), with some settings changed.

    Overrides are dotted, ``**{"training.epochs": 1}``, or nested, ``training={"epochs": 1}``.
    Raises SettingError for an unknown name or key (with the nearest known one) and for a wrong value.
    """
    chosen = name or os.environ.get("GLM4_PROFILE") or DEFAULT
    known = {profile.name: profile for profile in _PROFILES}
    if chosen not in known:
        raise SettingError(f"There is no profile {chosen!r}.", _suggestion(str(chosen), known))
    profile = known[chosen]
    for key, value in flat_settings(overrides).items():
        profile = _replaced(profile, key, value)
    return profile


def profile_settings(profile: Profile) -> dict[str, Any]:
    """The profile as a dict that JSON can hold: nested like the dataclasses, tuples as lists."""
    return _plain(dataclasses.asdict(profile))


def settings_from_yaml(path: str | Path) -> dict[str, Any]:
    """Settings of a YAML file as keyword arguments for ``get_profile``, with dotted keys.

    ``profile: NAME`` in the file chooses the profile. Raises SettingError naming file and key.
    """
    content = _read_yaml(Path(path))
    name = content.pop("profile", None)
    if name is not None and name not in profile_names():
        raise SettingError(f"{path}: there is no profile {name!r}.", _suggestion(str(name), profile_names()))
    settings = flat_settings(content)
    for key, value in settings.items():
        try:
            _replaced(get_profile(name), key, value)
        except SettingError as error:
            raise SettingError(f"{path}: {error.problem}", error.fix) from None
    return settings if name is None else {"name": name, **settings}


def _read_yaml(path: Path) -> dict[str, Any]:
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        """Reads 5e-4 as a number, as YAML 1.2 does; PyYAML alone takes it for text."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
    example = "Write it as key: value lines, such as training.epochs: 1."
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise SettingError(f"{path} can't be read: {error.strerror}.", "Give the path of a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is not YAML: {' '.join(str(error).split())}.", example) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingError(f"{path} holds no settings.", example)
    return content


def flat_settings(overrides: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in overrides.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" != "columns":
            flat.update(flat_settings(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _replaced(profile: Profile, key: str, value: Any) -> Profile:
    """``profile`` with the setting at the dotted ``key`` changed."""
    group, _, field = key.rpartition(".")
    if key not in _known_keys():
        raise SettingError(f"There is no setting {key!r}.", _suggestion(key, _known_keys()))
    if not group:
        return dataclasses.replace(profile, **{key: _checked(Profile, key, key, value)})
    settings = getattr(profile, group)
    if settings is None:
        raise SettingError(
            f"{key} can't be set: profile {profile.name} trains all weights, without LoRA.",
            f"Remove {key}, or take a LoRA profile such as {DEFAULT}.",
        )
    changed = dataclasses.replace(settings, **{field: _checked(type(settings), field, key, value)})
    return dataclasses.replace(profile, **{group: changed})


def _known_keys() -> list[str]:
    keys = [field.name for field in dataclasses.fields(Profile) if field.name != "name"]
    keys += [f"lora.{field.name}" for field in dataclasses.fields(LoraSettings)]
    return keys + [f"training.{field.name}" for field in dataclasses.fields(TrainingSettings)]


_AT_LEAST_ONE = {
    "r", "alpha", "per_device_batch_size", "evaluation_batch_size", "gradient_accumulation_steps", "max_length",
    "max_new_tokens",
}  # fmt: skip
_FRACTIONS = {"dropout", "warmup_fraction", "dev_fraction"}
_CHOICES = {
    "dtype": ("auto", "float32", "bfloat16"),
    "quantization": (None, "nf4"),
    # Those of transformers that need no settings of their own.
    "lr_scheduler": ("linear", "cosine", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"),
}


def _checked(owner: type, field: str, key: str, value: Any) -> Any:
    """``value`` if it suits the field, lists as tuples. Raises SettingError."""
    hint = typing.get_type_hints(owner)[field]
    if not _fits(hint, value):
        raise SettingError(
            f"{key} can't be {value!r} of type {type(value).__name__}.", f"Give {_type_name(hint)} for {key}."
        )
    value = tuple(value) if isinstance(value, list) else value
    if field in _CHOICES and value not in _CHOICES[field]:
        choices = ", ".join(str(choice) for choice in _CHOICES[field])
        why = " (float16 gives NaN on GLM-4-9B)" if field == "dtype" else ""
        raise SettingError(f"{key} can't be {value!r}.", f"Use one of {choices}{why}.")
    rule = _broken_rule(field, value)
    if rule:
        raise SettingError(f"{key} can't be {value!r}.", f"Give {key} {rule}.")
    return value


def _broken_rule(field: str, value: Any) -> str:
    """What the value should have been, or an empty string."""
    if field in _AT_LEAST_ONE and not value >= 1:
        return "a value of at least 1"
    if field == "early_stopping_patience" and value is not None and not value >= 1:
        return "a value of at least 1, or null"
    if field in {"epochs", "learning_rate"} and not 0 < value < float("inf"):
        return "a value above 0"
    if field in _FRACTIONS and not 0 <= value < 1:
        return "a value from 0 up to, but not including, 1"
    if field == "seed" and not 0 <= value < 2**32:
        return f"a value from 0 to {2**32 - 1}"
    if field in {"weight_decay", "evaluations_per_run"} and not value >= 0:
        return "a value of at least 0"
    return "at least one name" if field == "target_modules" and not value else ""


def _fits(hint: Any, value: Any) -> bool:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return any(_fits_one(option, value) for option in options)


def _fits_one(option: Any, value: Any) -> bool:
    if typing.get_origin(option) is tuple:
        return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
    if typing.get_origin(option) is dict:
        return isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair)
    if option in (int, float):
        return isinstance(value, (int, option)) and not isinstance(value, bool)
    return isinstance(value, option)


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing (null)"}
    if typing.get_origin(hint) is tuple:
        return "a list of names"
    if typing.get_origin(hint) is dict:
        return "names such as {问题: instruction, 答案: output}"
    if isinstance(hint, types.UnionType):
        options = [option for option in typing.get_args(hint) if not (option is int and float in typing.get_args(hint))]
        return " or ".join(_type_name(option) for option in options)
    return names.get(hint, f"a {hint.__name__}")


def _suggestion(unknown: str, known: Iterable[str]) -> str:
    """The nearest known name, by the whole of it or by the part after the dot; else those of the same group."""
    known = [name for name in known if name not in ("lora", "training")]
    group, _, last_part = unknown.rpartition(".")
    known = [name for name in known if group and name.startswith(f"{group}.")] or known
    last_parts = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(unknown, known, 1, 0.8)
    near += [last_parts[part] for part in difflib.get_close_matches(last_part, last_parts, 1)]
    return f"Did you mean {near[0]}?" if near else f"Use one of {', '.join(known)}."


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
