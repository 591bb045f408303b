"""What happens between the training steps: answers at checkpoints, a stop at NaN, progress on the screen.

Each is a stock TrainerCallback; the trainer itself is put together in training.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, ProgressCallback, TrainerCallback
from transformers.utils import is_in_notebook

from ..generation import answers
from ..machine.room import launched_zero_stage
from ..support.errors import SettingError
from ..support.files import read_json, write_json

# Answers


class AnswerAtCheckpoints(TrainerCallback):
    """Greedy answers to fixed questions before the first step and at each evaluation, kept in a file and reported.

    A run without evaluations answers none: its first answers would have nothing to be compared with.

    `records` is a list of {"step", "stop_rate", "answers": [{"question", "answer", "stopped"}]}.
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
        if not state.global_step and args.eval_strategy != "no":
            self._answer(args, state, model)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self._answer(args, state, model)

    def _answer(self, args, state, model) -> None:
        # Where the weights are spread over processes, one process alone can't generate.
        plugin = args.deepspeed_plugin
        sharded = plugin is not None and plugin.zero_stage == 3 or launched_zero_stage() == 3
        if state.is_world_process_zero and not sharded and self.conversations:
            self._keep(_record(model, self.tokenizer, self.conversations, self.max_new_tokens, state.global_step))
        PartialState().wait_for_everyone()

    def _keep(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        write_json(self.file, self.records)
        if self.report is not None:
            self.report(record)


def _record(model, tokenizer, conversations, max_new_tokens: int, step: int) -> dict[str, Any]:
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # answering must not change the dropout of later steps
        given = answers(model, tokenizer, conversations, max_new_tokens, batch_size=16)
    return {
        "step": step,
        "stop_rate": sum(answer.stopped for answer in given) / len(given),
        "answers": [
            {"question": messages[-1]["content"], "answer": answer.text, "stopped": answer.stopped}
            for messages, answer in zip(conversations, given, strict=True)
        ],
    }


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


# Progress


def progress() -> TrainerCallback | None:
    """Transformers' table in a notebook and its bar in a terminal; a line at each evaluation elsewhere."""
    if not PartialState().is_main_process:
        return None
    if is_in_notebook():
        from transformers.utils.notebook import NotebookProgressCallback

        return NotebookProgressCallback()
    return TerminalBar() if sys.stderr.isatty() else EvaluationLines()


class TerminalBar(ProgressCallback):
    """Transformers' bar with the latest losses at its end, where the stock one prints every log as a raw dict."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: dict[str, str] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = {"loss": "loss", "eval_loss": "dev_loss"}
        self.losses |= {names[key]: f"{value:.3f}" for key, value in (logs or {}).items() if key in names}
        self.training_bar.set_postfix(self.losses)


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
