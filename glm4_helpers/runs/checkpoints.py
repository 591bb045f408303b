"""Checkpoints: which are whole, and where a run starts, from the newest of them or with an empty folder.

What a run depends on is worked out in provenance; what it leaves behind is written in results.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from ..checks.adapters import save_adapter_facts
from ..profiles import Profile
from ..support.errors import SettingError
from ..support.files import read_json, write_json
from ..support.paths import RUN_FILE, shown
from .provenance import difference

ANSWERS_FILE = "answers.json"

MARKER = "complete.json"
"""Written last into a checkpoint: its files with their sizes in bytes, and the seconds trained so far."""

_STATE = "trainer_state.json"


# Where a run starts


@dataclass(frozen=True)
class Start:
    """Where a run starts: the checkpoint to go on from, and the tracked run so far; None for what there is not."""

    checkpoint: Path | None
    tracked: dict[str, Any] | None

    @property
    def step(self) -> int | None:
        """The checkpoint's step."""
        return int(self.checkpoint.name.rpartition("-")[2]) if self.checkpoint else None

    def history(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Logs and answers up to the checkpoint."""
        if self.checkpoint is None:
            return [], []
        answered = read_json(self.checkpoint.parent / ANSWERS_FILE) or []
        return read_json(self.checkpoint / _STATE)["log_history"], [row for row in answered if row["step"] <= self.step]


def unfinished_run(work: Path) -> dict[str, Any] | None:
    """What the run in the folder of checkpoints was started with; None where there is none or it is finished."""
    run = read_json(work / RUN_FILE)
    return None if run is None or run["finished"] else run


def find_start(work: Path, facts: Mapping[str, Any], resume: bool) -> Start:
    """Go on from the newest complete checkpoint of the same run, else begin with an empty folder.

    Raises SettingError for an unfinished run of other settings, rows, base or versions, which stays as it is.
    """
    run = unfinished_run(work) if resume else None
    changed = difference(run["facts"], facts) if run else ""
    checkpoint = _newest(work)
    if run is None or checkpoint is None:
        return _begin(work, facts, _tracked(run, work) if run and not changed else None)
    if changed:
        raise SettingError(
            f"{shown(work)} holds an unfinished run of another kind: {changed}.",
            "Use its settings to go on with it, or another folder (--output, output_dir) to keep it; "
            "--no-resume (resume=False) deletes it and starts from the beginning.",
        )
    for step, folder in checkpoint_folders(work):
        if step > int(checkpoint.name.rpartition("-")[2]):
            shutil.rmtree(folder)
    _name_best_here(checkpoint)
    return Start(checkpoint, _tracked(run, work))


def _newest(work: Path) -> Path | None:
    """The newest complete checkpoint from which training would go on."""
    whole = [folder for _, folder in checkpoint_folders(work) if is_complete(folder)]
    return next((folder for folder in reversed(whole) if not _stopped_early(folder)), None)


def _stopped_early(checkpoint: Path) -> bool:
    """Whether early stopping ended the run here. The trainer forgets that, and the checkpoint before repeats it."""
    state = read_json(checkpoint / _STATE)
    control = state["stateful_callbacks"].get("TrainerControl", {}).get("attributes", {})
    return bool(control.get("should_training_stop")) and state["global_step"] < state["max_steps"]


def _begin(work: Path, facts: Mapping[str, Any], tracked: dict[str, Any] | None) -> Start:
    """An empty folder for a new run, or for one that was cut short before its first checkpoint."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_json(work / RUN_FILE, {"facts": {**facts, "folder": str(work)}, "finished": False})
    return Start(None, tracked)


def _tracked(run: Mapping[str, Any], work: Path) -> dict[str, Any] | None:
    """How the run was tracked. Where its folder was copied, the tracked files are still the first run's."""
    tracked = run.get("tracking")
    return {**tracked, "folder": None} if tracked and run["facts"]["folder"] != str(work) else tracked


def _name_best_here(checkpoint: Path) -> None:
    """The trainer keeps the best checkpoint's absolute path, which is wrong in a folder that was moved or copied."""
    state, marker = read_json(checkpoint / _STATE), read_json(checkpoint / MARKER)
    here = str(checkpoint.with_name(f"checkpoint-{state['best_global_step']}"))
    if state["best_model_checkpoint"] not in (None, here):
        write_json(checkpoint / _STATE, {**state, "best_model_checkpoint": here})
        write_json(checkpoint / MARKER, {**marker, "files": _sizes(checkpoint)})


# Whole checkpoints


def checkpoint_folders(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints in `folder`, complete or not, as (step, path), the oldest first."""
    named = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in named if match)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end and every file of it still has its size."""
    marker = read_json(checkpoint / MARKER)
    return isinstance(marker, dict) and marker.get("files") == _sizes(checkpoint)


class MarkComplete(TrainerCallback):
    """Marks each checkpoint once all of its files are there, so that one cut short can be told from a whole one.

    Before the mark comes which base model the checkpoint belongs to, so that it loads like a finished adapter.
    It also has the trainer log wherever it saves, since the mean loss since the last log is not part of a checkpoint,
    and at the last step, so that a run shorter than the distance between two logs has a loss, too.
    """

    def __init__(self, profile: Profile, resumed_from: Path | None = None) -> None:
        self.profile = profile
        self.earlier_seconds = read_json(resumed_from / MARKER)["seconds"] if resumed_from else 0.0
        self.started_at = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before an interruption included."""
        return self.earlier_seconds + time.monotonic() - self.started_at

    def on_train_begin(self, args, state, control, **kwargs):
        self.started_at = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save or control.should_evaluate or state.global_step >= state.max_steps:
            control.should_log = True

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()  # every process keeps its own random state in the checkpoint
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_adapter_facts(folder, self.profile)
            write_json(folder / MARKER, {"files": _sizes(folder), "seconds": self.seconds})


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
