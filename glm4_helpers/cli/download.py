"""Base models from Hugging Face or ModelScope to weights/: room first, resumable, checked afterwards.

The hubs' own clients do the transfer. Data sets are fetched where they are read, in datasets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checks.weights import read_required_json
from ..profiles import Profile, get_profile, profile_names
from ..support.errors import CourseError, MachineError, ModelError, SettingError, first_line
from ..support.files import GIB, read_json, require_disk
from ..support.paths import home

SOURCES = ("huggingface", "modelscope")
PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model", "README.md", "LICENSE*")
"""Files that are fetched; pictures and weights in other formats are not."""
SPARE_BYTES = GIB
"""Room that has to stay free on the disk."""
_NAMES = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its path there, and its bytes."""

    name: str
    size: int


def download(
    profile: Profile,
    source: str = "huggingface",
    repository: str | None = None,
    endpoint: str | None = None,
) -> Path:
    """Fetch the profile's base model to its folder in weights/ and return the folder.

    What is there already is kept, and a file that was cut short is completed. ``repository`` None takes the
    profile's; one of another name, such as a chat model to compare with, goes to weights/NAME. ``endpoint`` None takes
    HF_ENDPOINT or MODELSCOPE_ENDPOINT, else the hub's own address. Raises SettingError for a model in the old format,
    MachineError for too little disk space or a hub that can't be reached, and ModelError where files are missing or
    damaged afterwards.
    """
    repository = repository or hub_id(profile, source)
    refuse_old_name(repository)
    profile = dataclasses.replace(profile, base_model=_base_model(profile, source, repository))
    folder = home() / profile.base_model
    _refuse_other_model(folder, profile)
    with _readable_errors(repository, source):
        files = remote_files(repository, source, endpoint)
        _check_remote(files, repository, source)
        check_disk(folder, files)
        _fetch(repository, source, endpoint, folder, ("config.json",))
        refuse_old_format(folder, repository)
        _fetch(repository, source, endpoint, folder, PATTERNS)
    verify(folder, profile)
    return folder


def hub_id(profile: Profile, source: str) -> str:
    """The profile's repository on the hub. Raises SettingError where it has none, or for an unknown hub."""
    if source not in SOURCES:
        raise SettingError(f"There is no source {source!r}.", f"Use {' or '.join(SOURCES)}.")
    found = profile.hub_id if source == "huggingface" else profile.modelscope_id
    if found is None:
        fix = (
            "It ships with the repository." if profile.hub_id is None else "Use the other source, or give --repository."
        )
        raise SettingError(f"{profile.name} has no repository on {_NAMES[source]}.", fix)
    return found


def _base_model(profile: Profile, source: str, repository: str) -> str:
    """Where the repository belongs: a model of another name must not be written over the profile's own."""
    name = repository.rpartition("/")[2]
    own = profile.hub_id if source == "huggingface" else profile.modelscope_id
    names = {Path(profile.base_model).name.lower(), str(own).rpartition("/")[2].lower()}
    return profile.base_model if name.lower() in names else f"weights/{name}"


def refuse_old_name(repository: str) -> None:
    """Raise SettingError for an old-format repository of any profile, with the name of the one to use."""
    owner, _, name = repository.rpartition("/")
    if name.lower() in {old for known in profile_names() for old in get_profile(known).old_names}:
        raise _old_format(repository, f"{owner or 'zai-org'}/{name}-hf")


def refuse_old_format(folder: Path, repository: str) -> None:
    """Raise SettingError where config.json asks for remote code, as the repositories without -hf do."""
    config = read_required_json(folder / "config.json", "Run it again, or try the other --source.")
    if "auto_map" in config or config.get("model_type") == "chatglm":
        shutil.rmtree(folder) if _only_config(folder) else None
        raise _old_format(repository, f"{repository}-hf")


def verify(folder: Path, profile: Profile) -> None:
    """Raise ModelError unless config, tokenizer and every shard that the index names are there and complete."""
    from .. import models

    models.check_weights(folder, profile)
    models.load_tokenizer(profile)


def check_disk(folder: Path, files: Sequence[RemoteFile]) -> None:
    """Raise MachineError unless what is still missing fits on the disk, with SPARE_BYTES left over."""
    missing = sum(file.size for file in files if not _is_whole(folder / file.name, file.size))
    fix = "Free some space, or clone the course onto a larger disk (GLM4_HOME may name it)."
    require_disk(folder, missing + SPARE_BYTES, "The download", fix)


def remote_files(repository: str, source: str, endpoint: str | None = None) -> list[RemoteFile]:
    """The files that would be fetched, with their sizes; all of them, also those that are here already."""
    listed = (
        _hugging_face_files(repository, endpoint)
        if source == "huggingface"
        else _modelscope_files(repository, endpoint)
    )
    return [file for file in listed if any(fnmatch.fnmatch(file.name, pattern) for pattern in PATTERNS)]


def _hugging_face_files(repository: str, endpoint: str | None) -> list[RemoteFile]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    tree = HfApi(endpoint=endpoint).list_repo_tree(repository, recursive=True)
    return [RemoteFile(entry.path, entry.size) for entry in tree if isinstance(entry, RepoFile)]


def _modelscope_files(repository: str, endpoint: str | None) -> list[RemoteFile]:
    with _modelscope():
        from modelscope.hub.api import HubApi
    listed = HubApi(endpoint=endpoint).get_model_files(repository, recursive=True)
    return [RemoteFile(entry["Path"], entry["Size"]) for entry in listed if entry.get("Type") != "tree"]


def _fetch(repository: str, source: str, endpoint: str | None, folder: Path, patterns: Sequence[str]) -> None:
    if source == "huggingface":
        from huggingface_hub import snapshot_download

        snapshot_download(repository, local_dir=folder, allow_patterns=list(patterns), endpoint=endpoint, max_workers=4)
        return
    with _modelscope():
        from modelscope.hub.snapshot_download import snapshot_download
    snapshot_download(repository, local_dir=str(folder), allow_patterns=list(patterns), endpoint=endpoint)


@contextlib.contextmanager
def _modelscope() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MachineError(
            "The package modelscope is not installed.", 'Run: python -m pip install -e ".[modelscope]"'
        ) from error


@contextlib.contextmanager
def _readable_errors(repository: str, source: str) -> Iterator[None]:
    """The clients raise dozens of kinds of errors: offline, absent, gated, cut off, no room."""
    try:
        yield
    except CourseError:
        raise
    except Exception as error:
        reason = first_line(error)
        other = SOURCES[source == "huggingface"]
        raise MachineError(
            f"{repository} could not be downloaded from {_NAMES[source]}: {reason}",
            f"Check name and network, and that HF_HUB_OFFLINE is unset; then run it again, what is here is kept. Or "
            f"try a mirror (--endpoint) or --source {other}.",
        ) from error


def _check_remote(files: Sequence[RemoteFile], repository: str, source: str) -> None:
    names = {file.name for file in files}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"{repository} on {_NAMES[source]} holds no model: no config.json with safetensors.",
            "Check the name of the repository.",
        )


def _refuse_other_model(folder: Path, profile: Profile) -> None:
    """Another model's folder is left alone: a download would overwrite its files."""
    found = (read_json(folder / "config.json") or {}).get("architectures") or []
    if found and profile.architecture not in found:
        raise ModelError(
            f"{folder} holds another model ({found[0]}); nothing was overwritten.", "Move the folder away first."
        )


def _old_format(repository: str, right: str) -> SettingError:
    return SettingError(
        f"{repository} is in the old format, which needs its own remote code and breaks on current transformers.",
        f"Use {right}.",
    )


def _only_config(folder: Path) -> bool:
    """Whether nothing but the config, and the clients' notes, was fetched so far."""
    return {path.name for path in folder.iterdir()} <= {"config.json", ".cache", ".msc", ".mv", "._____temp", ".mdl"}


def _is_whole(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size
