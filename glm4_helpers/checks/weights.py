"""Whether a base model's files are there, whole and of the profile's architecture, and which weights they are.

Nothing is loaded here: that is for models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..profiles import Profile
from ..support.errors import ModelError
from ..support.paths import home


def base_folder(profile: Profile) -> Path:
    """Where the profile's base model is, whether its files are there yet or not."""
    return home() / profile.base_model


def check_weights(folder: Path, profile: Profile) -> None:
    """Raise ModelError, naming the first file at fault, unless config and all weights are there and whole.

    The config has to be of the profile's architecture: another one, or the old format with its own code, is refused.
    """
    require_json(folder, ("config.json",), profile)
    check_architecture(folder, profile)
    for file in weight_files(folder, profile):
        problem = damage(file)
        if problem:
            raise ModelError(f"{file} {problem}.", weights_fix(profile))


def check_architecture(folder: Path, profile: Profile) -> None:
    config = read_required_json(folder / "config.json", weights_fix(profile))
    architecture = (config.get("architectures") or ["model without an architecture"])[0]
    if architecture == profile.architecture and "auto_map" not in config:
        return
    old = ", in the old format that needs its own remote code" if "auto_map" in config else ""
    raise ModelError(
        f"{folder} holds a {architecture}{old}; {profile.name} needs {profile.architecture}.",
        f"Choose the profile of that model, or move the folder away. {weights_fix(profile)}",
    )


def check_loaded(found: Mapping[str, Any], folder: Path, profile: Profile) -> None:
    """Raise ModelError for weights that transformers would replace by random ones."""
    absent, misfits = sorted(found["missing_keys"]), sorted(key[0] for key in found["mismatched_keys"])
    if absent or misfits:
        what = f"lack {absent[0]}" if absent else f"hold {misfits[0]} in another shape than config.json says"
        raise ModelError(
            f"The weights in {folder} {what} ({len(absent)} absent, {len(misfits)} of another shape).",
            weights_fix(profile),
        )


def weight_files(folder: Path, profile: Profile) -> list[Path]:
    """The safetensors files of a model folder, in order. Raises ModelError for the first one that is absent."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        _require_files(folder, ("model.safetensors",), profile)
        return [folder / "model.safetensors"]
    names = sorted(set(read_required_json(index, weights_fix(profile)).get("weight_map", {}).values()))
    if not names:
        raise ModelError(f"{index} names no files.", weights_fix(profile))
    _require_files(folder, names, profile)
    return [folder / name for name in names]


def base_fingerprint(folder: Path) -> str:
    """A short digest that changes with a model's shape or weights: config, file headers and samples of the data.

    Reads about 64 KB a file, so it takes no time for 9B either. Settings that don't change the weights (versions,
    stop ids) stay out, and it is the same whether transformers 4 or 5 wrote the config. Raises OSError for a folder
    without a model.
    """
    digest = hashlib.sha256()
    config = read_required_json(folder / "config.json", "Get the file again.")
    volatile = ("transformers_version", "_name_or_path", "eos_token_id", "pad_token_id", "use_cache", "dtype")
    kept = {key: value for key, value in config.items() if key not in (*volatile, "torch_dtype")}
    kept.setdefault("bos_token_id", None)  # transformers 5 writes it where 4 leaves it out
    rope = {"rope_type": "default", **(kept.pop("rope_scaling", None) or {})}  # 4 writes the parts of rope_parameters
    rope |= {key: kept.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in kept}
    kept["rope_parameters"] = rope | (kept.get("rope_parameters") or {})
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


def damage(file: Path) -> str | None:
    """What is wrong with a safetensors file, judged by its header and size; None when it is whole."""
    with file.open("rb") as stream:
        if stream.read(8) == b"version ":
            return "is a Git LFS pointer, not weights"
    try:
        with safe_open(file, framework="pt"):
            return None
    except SafetensorError as error:
        return f"is damaged or incomplete ({error})"


def _require_files(folder: Path, names: Iterable[str], profile: Profile) -> None:
    if not folder.is_dir():
        raise ModelError(f"The model of {profile.name} is not here: no folder {folder}.", weights_fix(profile))
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(f"The model of {profile.name} is incomplete: no {folder / name}.", weights_fix(profile))


def require_json(folder: Path, names: Iterable[str], profile: Profile) -> None:
    _require_files(folder, names, profile)
    for name in names:
        read_required_json(folder / name, weights_fix(profile))


def weights_fix(profile: Profile) -> str:
    if profile.hub_id is None:
        return f"Run: git checkout -- {profile.base_model}   (it ships with the repository)"
    return f"Run: python -m glm4_helpers download --profile {profile.name}   (complete files are kept)"


def read_required_json(file: Path, fix: str) -> dict[str, Any]:
    """The settings in a JSON file that has to be right; `files.read_json` returns None instead of raising.

    Raises ModelError with this `fix` where it is not JSON or holds no object, OSError where it is absent.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}.", fix) from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no settings but {type(content).__name__}.", fix)
    return content
