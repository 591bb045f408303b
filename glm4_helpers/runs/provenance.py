"""What a run depends on, and in words how two runs differ.

Where it is written down is decided in checkpoints and results.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset

from .. import models
from ..checks import weights
from ..data import fingerprint
from ..profiles import Profile, changes_weights, flat_settings, profile_settings
from ..support.files import read_json
from ..support.paths import RUN_FILE, TRAINING_FILE

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
"""Packages whose versions are recorded with an adapter, and have to match for it to count as this profile's."""


def run_facts(profile: Profile, train: Dataset, dev: Dataset | None) -> dict[str, Any]:
    """All that decides what training gives. On a CPU with the same number of threads equal facts give an equal adapter,
    to the byte. Another number of threads adds in another order, and so does each run on a GPU in attention's backward
    pass: the last digits differ then, and after a whole training a few answers."""
    return {
        "profile": profile_settings(profile),
        "data": {"train": fingerprint(train), "dev": fingerprint(dev) if dev else None},
        "base": weights.base_fingerprint(weights.base_folder(profile)),
        "versions": {name: importlib.metadata.version(name).split("+")[0] for name in PACKAGES},
        "processes": PartialState().num_processes,
    }


def with_dtype(profile: Profile, record: Mapping[str, Any] | None) -> Profile:
    """The profile with the dtype that "auto" stands for: that of the recorded run, else the one for this machine."""
    if profile.dtype != "auto":
        return profile
    if record is not None:
        return dataclasses.replace(profile, dtype=record["facts"]["profile"]["dtype"])
    return dataclasses.replace(profile, dtype=str(models.resolve_dtype(profile.dtype)).removeprefix("torch."))


def as_trained(profile: Profile, trained: Path) -> Profile:
    """The profile with the rows and the split that the adapter (or model) in `trained` was trained with.

    Rows that another training holds out may be among the rows of this one.
    """
    record = read_json(Path(trained) / TRAINING_FILE) or read_json(Path(trained).parent / RUN_FILE)
    if record is None:
        return profile
    settings = record["facts"]["profile"]
    return dataclasses.replace(
        profile,
        **{name: settings[name] for name in ("train_data", "dev_data", "dev_fraction")},
        training=dataclasses.replace(profile.training, seed=settings["training"]["seed"]),
    )


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How the facts of two runs differ, in words; empty where nothing that matters does."""
    old, new = flat_settings(before), flat_settings(now)
    names = [name for name in {**old, **new} if name != "folder" and changes_weights(name.removeprefix("profile."))]
    changed = [name for name in names if old.get(name) != new.get(name)]
    return "; ".join(
        f"{name.removeprefix('profile.')} was {_brief(old.get(name))} and is {_brief(new.get(name))}"
        for name in changed
    )


def _brief(value: Any) -> str:
    """A setting as it reads in a sentence; of a fingerprint the start is enough."""
    return value[:12] if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16,}", value) else repr(value)
