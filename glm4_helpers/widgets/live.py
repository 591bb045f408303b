"""The live plot of a training run in a notebook: losses as they are logged, drawn by plots.

It only watches. Training itself, and what is kept of it, lives in training and tracking.
"""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..plots import loss_figure


class LivePlot(TrainerCallback):
    """Draws the trainer's log_history into one output of the cell, at most every `seconds`, and once at the end."""

    def __init__(self, seconds: float = 2.0) -> None:
        self.seconds = seconds
        self._handle: Any = None
        self._drawn_at = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run makes an output of its own, also when the callback was used before."""
        self._handle = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw, unless the last drawing is too recent."""
        if state.is_world_process_zero and time.monotonic() - self._drawn_at >= self.seconds:
            self._draw(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the whole run."""
        if state.is_world_process_zero:
            self._draw(state)

    def _draw(self, state: TrainerState) -> None:
        from IPython.display import display

        figure = loss_figure(state.log_history, total_steps=state.max_steps)
        if self._handle is None:
            self._handle = display(figure, display_id=True)
        else:
            self._handle.update(figure)
        self._drawn_at = time.monotonic()


def live_plot(seconds: float = 2.0) -> LivePlot:
    """A trainer callback for notebooks: `callbacks=[live_plot()]`."""
    return LivePlot(seconds)
