"""What a run leaves behind: the finished adapter with its record, put in place in one step, and read again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks.adapters import save_adapter_facts
from ..machine.hardware import this_machine
from ..profiles import Profile
from ..support.files import read_json, write_json
from ..support.paths import RUN_FILE, TRAINING_FILE, share_weights
from .checkpoints import ANSWERS_FILE, Start
from .processes import on_main

if TYPE_CHECKING:
    from trl import SFTTrainer

_RECORDED = ("seconds", "final_loss", "log_history", "checkpoints", "best_step", "resumed_from")


@dataclass(frozen=True)
class TrainingResult:
    """A finished adapter (or, without LoRA, model) and how its training went.

    `checkpoints` holds step, dev_loss, dev_token_accuracy, stop_rate and best for each evaluation; losses are in
    nats per assistant token. The trainer averages dev figures over batches, so they shift with the evaluation batch
    size. `final_loss` is the last training loss, also where an earlier checkpoint was kept (`best_step`). `seconds`
    covers all parts of an interrupted run. `reason` is why `train_or_load` trained it or could load it; `train`, which
    decides nothing, leaves it empty.
    """

    adapter_dir: Path
    seconds: float
    final_loss: float
    log_history: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    resumed_from: int | None = None
    loaded: bool = False
    reason: str = ""

    @property
    def kept(self) -> str:
        """Which weights were kept and their loss, in words."""
        for look in self.checkpoints:
            if look["best"]:
                return f"the checkpoint of step {look['step']}, dev loss {look['dev_loss']:.4f}"
        return f"the weights of the last step, training loss {self.final_loss:.4f}"


def result_of(
    trainer: SFTTrainer, adapter_dir: Path, seconds: float, answered: Sequence[Mapping[str, Any]], start: Start
) -> TrainingResult:
    """The result of a trainer that is done. `answered` are the records of AnswerAtCheckpoints."""
    history = trainer.state.log_history
    best = trainer.state.best_global_step
    stop_rates = {record["step"]: record["stop_rate"] for record in answered}
    looks = [
        {
            "step": row["step"],
            "dev_loss": row["eval_loss"],
            "dev_token_accuracy": row["eval_mean_token_accuracy"],
            "stop_rate": stop_rates.get(row["step"]),
            "best": row["step"] == best,
        }
        for row in history
        if "eval_loss" in row
    ]
    return TrainingResult(
        adapter_dir=adapter_dir,
        seconds=round(seconds, 2),
        final_loss=[row["loss"] for row in history if "loss" in row][-1],
        log_history=history,
        checkpoints=looks,
        best_step=best,
        resumed_from=start.step,
    )


def load_result(adapter_dir: Path) -> TrainingResult:
    """The result that `publish` has put there."""
    record = read_json(adapter_dir / TRAINING_FILE)
    return TrainingResult(adapter_dir, **{name: record[name] for name in _RECORDED}, loaded=True)


def publish(
    trainer: SFTTrainer, profile: Profile, result: TrainingResult, facts: Mapping[str, Any], work: Path
) -> None:
    """Write the finished folder under another name, then put it in place in one step."""
    staging = result.adapter_dir.with_name(f".{result.adapter_dir.name}-unfinished")
    on_main(lambda: shutil.rmtree(staging, ignore_errors=True))
    trainer.save_model(str(staging))  # in every process: weights that are spread out are gathered here
    record = {
        "facts": dict(facts),
        "seed": profile.training.seed,
        "machine": this_machine().cpu,
        "distributed_type": trainer.accelerator.distributed_type.value,
        **{name: getattr(result, name) for name in _RECORDED},
    }
    on_main(lambda: _complete(staging, profile, result.adapter_dir, record, work))


def _complete(staging: Path, profile: Profile, final: Path, record: Mapping[str, Any], work: Path) -> None:
    (staging / "training_args.bin").unlink(missing_ok=True)
    if profile.lora is not None:
        _keep_adapter_only(staging, profile)
    save_adapter_facts(staging, profile)
    share_weights(staging)
    if (work / ANSWERS_FILE).exists():
        shutil.copy(work / ANSWERS_FILE, staging / ANSWERS_FILE)
    write_json(staging / TRAINING_FILE, record)
    _swap(staging, final)
    write_json(work / RUN_FILE, {**read_json(work / RUN_FILE), "finished": True})


def _keep_adapter_only(folder: Path, profile: Profile) -> None:
    for path in folder.iterdir():
        if not path.name.startswith("adapter_"):
            path.unlink()
    config = read_json(folder / "adapter_config.json")
    config["base_model_name_or_path"] = profile.hub_id or profile.base_model  # not where it was on this machine
    write_json(folder / "adapter_config.json", config)


def _swap(staging: Path, final: Path) -> None:
    """Put `staging` in the place of `final`, which may exist."""
    old = final.with_name(f".{final.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    staging.rename(final)
    shutil.rmtree(old, ignore_errors=True)
