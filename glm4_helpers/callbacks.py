"""What happens beside the training steps: answers at checkpoints, complete checkpoints, progress on the screen.

Each is a stock TrainerCallback; the trainer itself is put together in training.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, TrainerCallback

from .environment import launched_zero_stage
from .errors import SettingError
from .generation import answers
from .models import save_adapter_facts
from .profiles import Profile

MARKER = "complete.json"
"""Written last into a checkpoint: its files with their sizes in bytes, and the seconds trained so far."""


# Files


def write_json(path: Path, content: Any) -> None:
    """Write a whole file or none: to a temporary name first, which then takes the place of ``path``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any | None:
    """The content of a JSON file; None where it is absent or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# Checkpoints


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end and every file of it still has its size."""
    marker = read_json(checkpoint / MARKER)
    return isinstance(marker, dict) and marker.get("files") == _sizes(checkpoint)


def checkpoint_folders(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints in ``folder``, complete or not, as (step, path), the oldest first."""
    named = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in named if match)


class MarkComplete(TrainerCallback):
    """Marks each checkpoint once all of its files are there, so that one cut short can be told from a whole one.

    Before the mark comes which base model the checkpoint belongs to, so that it loads like a finished adapter.
    It also has the trainer log wherever it saves, since the mean loss since the last log is not part of a checkpoint, and
    at the last step, so that a run shorter than the distance between two logs has a loss, too.
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


# Answers


class AnswerAtCheckpoints(TrainerCallback):
    """Greedy answers to fixed questions before the first step and at each evaluation, kept in a file and reported.

    ``records`` is a list of {"step", "stop_rate", "answers": [{"question", "answer", "stopped"}]}.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        conversations: Sequence[Sequence[dict[str, str]]],
        max_new_tokens: int,
        file: Path,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.conversations = list(conversations)
        self.max_new_tokens = max_new_tokens
        self.file = file
        self.report = report
        self.records: list[dict[str, Any]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        earlier = (read_json(self.file) or []) if state.global_step else []
        self.records = [record for record in earlier if record["step"] <= state.global_step]
        if not state.global_step:
            self._answer(args, state, model)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self._answer(args, state, model)

    def _answer(self, args, state, model) -> None:
        # Where the weights are spread over processes, one process alone can't generate.
        sharded = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3 or launched_zero_stage() == 3
        if state.is_world_process_zero and not sharded and self.conversations:
            self._keep(_record(model, self.tokenizer, self.conversations, self.max_new_tokens, state.global_step))
        PartialState().wait_for_everyone()

    def _keep(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        write_json(self.file, self.records)
        if self.report is not None:
            self.report(record)


def _record(model, tokenizer, conversations, max_new_tokens: int, step: int) -> dict[str, Any]:
    with torch.random.fork_rng():  # answering must not change the dropout of later steps
        given = answers(model, tokenizer, conversations, max_new_tokens, batch_size=16)
    return {
        "step": step,
        "stop_rate": sum(answer.stopped for answer in given) / len(given),
        "answers": [
            {"question": messages[-1]["content"], "answer": answer.text, "stopped": answer.stopped}
            for messages, answer in zip(conversations, given, strict=True)
        ],
    }


# Progress


def progress() -> TrainerCallback | None:
    """A plot that grows in a notebook, a bar in a terminal, a line at each evaluation elsewhere."""
    if not PartialState().is_main_process:
        return None
    if _in_notebook():
        return NotebookPlot()
    return TerminalBar() if sys.stderr.isatty() else EvaluationLines()


def _in_notebook() -> bool:
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel")


class TerminalBar(TrainerCallback):
    """A tqdm bar on standard error with the latest training and dev loss."""

    def __init__(self) -> None:
        self.bar = None
        self.losses: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        from tqdm import tqdm

        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc="training", mininterval=0.5)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        found = {"loss": (logs or {}).get("loss"), "dev_loss": (logs or {}).get("eval_loss")}
        self.losses |= {name: f"{value:.3f}" for name, value in found.items() if value is not None}
        self.bar.set_postfix(self.losses, refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class StopAtNan(TrainerCallback):
    """Ends a run whose loss or gradients are no numbers any more, before such weights are saved or paid for."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise SettingError(
                    f"Training broke down before step {state.global_step}: {name} is {value}.",
                    "Lower training.learning_rate, and leave dtype at the profile's. Any checkpoint is from before.",
                )


class EvaluationLines(TrainerCallback):
    """Lines on standard error, for logs, where a bar would be noise: at each evaluation, else one a minute."""

    seconds_between = 60.0

    def __init__(self) -> None:
        self.said_at = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}) and time.monotonic() - self.said_at > self.seconds_between:
            self._say(state, None)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._say(state, metrics)

    def _say(self, state, metrics) -> None:
        self.said_at = time.monotonic()
        losses = [row["loss"] for row in state.log_history if "loss" in row][-1:]
        loss = f", loss {losses[0]:.4f}" if losses else ""
        dev = (metrics or {}).get("eval_loss")
        dev_loss = f", dev loss {dev:.4f}" if dev is not None else ""
        print(f"step {state.global_step} of {state.max_steps}{loss}{dev_loss}", file=sys.stderr, flush=True)


class NotebookPlot(TrainerCallback):
    """One display in a notebook: a line of progress and the losses so far, drawn again every few seconds."""

    seconds_between = 4.0

    def __init__(self) -> None:
        self.line = self.plot = None
        self.drawn_at = self.started_at = 0.0
        self.first_step = 0

    def on_train_begin(self, args, state, control, **kwargs):
        from IPython.display import HTML, display

        self.started_at, self.first_step = time.monotonic(), state.global_step
        self.line = display(HTML(self._text(state)), display_id=True)
        self.plot = display(_loss_plot(state), display_id=True)
        self.drawn_at = time.monotonic()

    def on_log(self, args, state, control, **kwargs):
        if self.plot is not None and time.monotonic() - self.drawn_at > self.seconds_between:
            self._draw(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._draw(state)

    def _draw(self, state) -> None:
        from IPython.display import HTML

        self.line.update(HTML(self._text(state)))
        self.plot.update(_loss_plot(state))
        self.drawn_at = time.monotonic()

    def _text(self, state) -> str:
        seconds = time.monotonic() - self.started_at
        done = state.global_step - self.first_step
        left = seconds / done * (state.max_steps - state.global_step) if done else 0
        rest = f", about {left:.0f} s left" if left >= 1 else ""
        return (
            f'<progress value="{state.global_step}" max="{state.max_steps}"></progress> '
            f"step {state.global_step} of {state.max_steps}, {seconds:.0f} s{rest}"
        )


def _loss_plot(state):
    """Training and dev loss by step, as a matplotlib figure."""
    import matplotlib.pyplot as pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 3), layout="constrained")
    pyplot.close(figure)  # or the notebook would show it a second time
    for key, style, label in (("loss", "-", "training loss"), ("eval_loss", "o-", "dev loss")):
        points = [(row["step"], row[key]) for row in state.log_history if key in row]
        if points:
            axis.plot(*zip(*points), style, label=label)
    axis.set(xlabel="step", ylabel="loss per answer token", xlim=(0, max(1, state.max_steps)), ylim=(0, None))
    if axis.has_data():
        axis.legend()
    return figure
