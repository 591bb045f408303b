"""Public benchmarks such as C-Eval through EleutherAI's lm-eval: what a model may have forgotten by fine-tuning.

lm-eval is an optional package (the extra `evaluation`) and fetches its tasks' data itself. The course's own held-out
rows are scored in evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from .errors import DataError, MachineError, first_line
from .evaluation import baseline_profile, check_trained, score_both
from .models import load_base_model, load_tokenizer
from .profiles import Profile

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def before_after_tasks(
    profile: Profile,
    adapter_dir: Path,
    tasks: Sequence[str],
    limit: int | None = None,
    task_folder: Path | None = None,
    baseline: Path | None = None,
) -> dict[str, Any]:
    """Accuracy of base model, fine-tuned model and `baseline` on tasks of lm-eval, as plain text without the chat format.

    `limit` is the number of questions of each task, `task_folder` holds YAML files of your own tasks. Returns
    {"profile", "tasks", "before", "after"} and perhaps "baseline"; each side holds acc and acc_stderr by task, fractions
    from 0 to 1. Raises MachineError without lm-eval, DataError for an unknown task or data that can't be fetched.
    """
    manager = _task_manager(task_folder)
    _check_tasks(manager, tasks)
    check_trained(profile, adapter_dir)
    tokenizer = load_tokenizer(profile)
    batch_size = profile.training.evaluation_batch_size

    def score(model: nn.Module) -> dict[str, dict[str, float]]:
        return task_scores(model, tokenizer, tasks, manager, limit, batch_size)

    before, after = score_both(profile, adapter_dir, None, score)
    result = {"profile": profile.name, "tasks": list(tasks), "before": before, "after": after}
    if baseline is not None:
        other = baseline_profile(profile, baseline)
        third = task_scores(load_base_model(other), load_tokenizer(other), tasks, manager, limit, batch_size)
        result["baseline"] = {"name": baseline.name, **third}
    return result


def task_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    manager: TaskManager,
    limit: int | None = None,
    batch_size: int = 4,
) -> dict[str, dict[str, float]]:
    """acc and acc_stderr of one model by task, and by subject where a task is a group."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # lm-eval leaves special tokens out unless told; GLM-4 was trained with its prefix in front of every text.
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=True)
    try:
        found = simple_evaluate(
            model=wrapped, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False, bootstrap_iters=0
        )
    except Exception as error:  # data sets raise dozens of kinds: offline, absent, gated, another format
        reason = first_line(error)
        raise DataError(
            f"lm-eval could not run {', '.join(tasks)}: {reason}",
            "Check the network (the task's data is fetched when it first runs) and that HF_HUB_OFFLINE is unset.",
        ) from error
    scored = {name: figures for name, figures in found["results"].items() if "acc,none" in figures}
    if not scored:
        metrics = sorted({key.partition(",")[0] for figures in found["results"].values() for key in figures if "," in key})
        raise DataError(
            f"{', '.join(tasks)} is not scored by accuracy, but by {', '.join(metrics)}.",
            "Choose tasks of multiple choice, such as ceval-valid_law.",
        )
    return {
        name: {"acc": figures["acc,none"], "acc_stderr": figures["acc_stderr,none"]} for name, figures in scored.items()
    }


def format_tasks(result: Mapping[str, Any]) -> str:
    """A plain table: accuracy and, after ±, its standard error, in per cent."""
    sides = {side: result[side] for side in ("before", "after", "baseline") if side in result}
    titles = [figures.get("name", side) for side, figures in sides.items()]
    lines = [f"{'':36}" + "".join(f"{title:>22}" for title in titles)]
    for task in result["before"]:
        lines.append(f"{task:36}" + "".join(f"{_percent(figures[task]):>22}" for figures in sides.values()))
    return "\n".join([*lines, "accuracy ± standard error, by lm-eval, as plain text without the chat format"])


def _percent(figures: Mapping[str, Any]) -> str:
    error = figures["acc_stderr"]
    return f"{figures['acc']:.1%}" + (f" ± {error:.1%}" if isinstance(error, float) else "")


def _task_manager(task_folder: Path | None) -> TaskManager:
    if task_folder is not None and not task_folder.is_dir():
        raise DataError(f"There is no folder {task_folder}.", "Give a folder with YAML files of tasks.")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MachineError(
            "The package lm-eval, which holds the public benchmarks, is not installed.",
            'Run: python -m pip install -e ".[evaluation]"',
        ) from error
    return TaskManager(include_path=str(task_folder) if task_folder else None)


def _check_tasks(manager: TaskManager, tasks: Sequence[str]) -> None:
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise DataError(
            f"lm-eval has no task {unknown[0]!r}.", "See their names with: lm-eval ls tasks. C-Eval is ceval-valid."
        )
