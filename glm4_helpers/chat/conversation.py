"""A conversation with a base model and its fine-tuned self: who speaks, what was said, and how each reply ended.

The chats in the terminal and in notebooks show it and take the questions; answers are written in generation.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..checks.adapters import check_adapter
from ..generation import Past, Sampling, fit_history, stream
from ..models import adapter_off, gradients_as_found, load_adapter
from ..profiles import Profile
from ..support.errors import ModelError, SettingError, renamed_names_ignored

BASE, TUNED = "base", "fine-tuned"

OWN = "as loaded"
"""The name of the adapter that a model came with."""


@dataclass
class Reply:
    """One model's answer to a question. `adapter` is the checkpoint that spoke, None for the base model.

    `state` is how it ended: `done` by itself, `empty`, `limit`, `stopped` or `failed`, and `writing` before that.
    """

    speaker: str
    adapter: str | None = None
    text: str = ""
    state: str = "writing"
    error: str = ""

    @property
    def name(self) -> str:
        """The speaker as it is shown, with the checkpoint."""
        return f"{self.speaker} ({self.adapter})" if self.adapter else self.speaker

    def message(self) -> dict[str, str]:
        """The reply as a message that also says what ended it, where it did not end by itself."""
        ended = {} if self.state == "done" else {"ended_by": self.error or self.state}
        return {"role": "assistant", "content": self.text, **ended}


@dataclass
class Turn:
    """A question with the replies to it: one, or two side by side."""

    question: str
    replies: list[Reply] = field(default_factory=list)


@dataclass
class Conversation:
    """Questions and replies so far, and what the next reply is written with.

    `dropped` is the number of turns that the last reply had no room for. Raises SettingError for answers as long as
    the model's positions.
    """

    speakers: Speakers
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    dropped: int = 0
    pasts: dict[str | None, tuple[Any, Past]] = field(default_factory=dict, repr=False)
    """By adapter, what was computed for the turns so far, and with which weights."""

    def __post_init__(self) -> None:
        positions = self.speakers.positions
        if self.sampling.max_new_tokens >= positions:
            raise SettingError(
                f"max_new_tokens can't be {self.sampling.max_new_tokens:,}: question and answer share the model's "
                f"{positions:,} positions.",
                f"Give max_new_tokens well below {positions:,}.",
            )

    def write(self, reply: Reply, stop: threading.Event | None = None) -> Generator[str, None, None]:
        """The pieces of a reply to the last question. After them the reply holds its text and how it ended.

        Raises SettingError at the call for a question that is too long, and later ModelError for an adapter that is
        absent or does not fit.
        """
        before = history(self.turns[:-1], reply.speaker, self.system)
        messages = [*before, {"role": "user", "content": self.turns[-1].question}]
        room = self.speakers.positions - self.sampling.max_new_tokens
        messages, self.dropped = fit_history(self.tokenizer, messages, room)
        return self._pieces(reply, messages, stop)

    def _pieces(self, reply: Reply, messages: list[Any], stop: threading.Event | None) -> Generator[str, None, None]:
        with self.speakers.speaking(reply.adapter) as model:
            # A checkpoint may have been read again, and a model trained on, since the last turn.
            weights = reply.adapter and model.active_adapter, sum(weight._version for weight in model.parameters())
            if self.pasts.get(reply.adapter, (None,))[0] != weights:
                self.pasts[reply.adapter] = weights, Past()
            past = self.pasts[reply.adapter][1]
            answer = yield from stream(model, self.tokenizer, messages, None, self.sampling, stop, past)
        reply.text = answer.text
        if answer.stopped:
            reply.state = "done" if answer.text else "empty"
        else:
            reply.state = "stopped" if stop and stop.is_set() else "limit"

    def save(self, file: Path, speaker: str, **about: Any) -> int:
        """Write what `speaker` knows of the conversation to a new file of training rows; gives the number of messages.

        `about` is written next to the messages. Raises SettingError where there is nothing to save or the file can't
        be written; a file that is there already is never overwritten.
        """
        messages = history(self.turns, speaker, self.system)
        if not any(message["role"] == "user" for message in messages):
            raise SettingError("There is nothing to save yet.", "Say something first.")
        try:
            with file.expanduser().open("x", encoding="utf-8") as opened:
                json.dump([{"messages": messages, **about}], opened, ensure_ascii=False, indent=2)
                opened.write("\n")
        except OSError as error:
            raise SettingError(f"{file} can't be written: {error.strerror}.", "Choose another file name.") from error
        return len(messages)


def all_messages(turns: Sequence[Turn], system: str = "") -> list[dict[str, str]]:
    """All messages as plain Python. Replies also have `model`, and where they did not end by themselves `ended_by`."""
    messages = _system_message(system)
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        messages += [reply.message() | {"model": reply.name} for reply in turn.replies]
    return messages


def history(turns: Sequence[Turn], speaker: str, system: str = "") -> list[dict[str, str]]:
    """What `speaker` is to continue: questions and its own replies, or the other's where it said nothing.

    Turns without any text in reply are left out.
    """
    messages = _system_message(system)
    for turn in turns:
        answered = sorted((reply for reply in turn.replies if reply.text), key=lambda reply: reply.speaker != speaker)
        if answered:
            messages += [{"role": "user", "content": turn.question}, answered[0].message()]
    return messages


def _system_message(system: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


# Who speaks


class Speakers:
    """One model whose adapters are switched on for a reply, and are otherwise as they were found.

    Adapters are read when they are first asked for. A plain base model gets them put on, stays the base model for
    whoever else uses it, and is given back without them by `close`.
    """

    def __init__(self, model: nn.Module, profile: Profile, adapters: Mapping[str, Path] | None = None) -> None:
        """Raises ModelError for a base model inside which another PeftModel has put an adapter."""
        self._plain = not isinstance(model, PeftModel)
        if self._plain and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ModelError(
                "This base model carries an adapter already.", "Give the model that load_adapter returned instead."
            )
        self._model = model
        self._profile = profile
        self._lock = threading.RLock()
        self._peft_names = {} if self._plain else {OWN: model.active_adapter}
        self.folders = {name: Path(folder) for name, folder in (adapters or {}).items()}

    @property
    def adapters(self) -> list[str]:
        """Names that `speaking` knows, the model's own adapter first."""
        return list(dict.fromkeys([*([] if self._plain else [OWN]), *self.folders]))

    @property
    def positions(self) -> int:
        """How many tokens prompt and answer may have together."""
        return self._model.config.max_position_embeddings

    @contextmanager
    def speaking(self, adapter: str | None) -> Iterator[nn.Module]:
        """The model with this adapter alone, or as the base model (None); others wait until the block is over.

        Raises ModelError where the adapter is absent or does not fit.
        """
        with self._lock:
            if adapter is None:
                with adapter_off(self._model):
                    yield self._model
                return
            if adapter not in self._peft_names:
                self.load(adapter)
            before = self._model.active_adapter
            with gradients_as_found(self._model):
                self._model.set_adapter(self._peft_names[adapter], inference_mode=True)
                self._model.base_model.enable_adapter_layers()
                try:
                    yield self._model
                finally:
                    self._model.set_adapter(before)
                    if self._plain:
                        self._model.base_model.disable_adapter_layers()

    def load(self, adapter: str) -> None:
        """Read this adapter from its folder, again if it was read before. Raises ModelError; then all stays."""
        folder = self.folders[adapter]
        with self._lock, gradients_as_found(self._model):
            if not isinstance(self._model, PeftModel):
                self._model = load_adapter(self._model, folder, self._profile)
                self._model.base_model.disable_adapter_layers()
                self._peft_names[adapter] = self._model.active_adapter
                return
            check_adapter(self._model, folder, self._profile)
            # PEFT's names become module names, which can't hold a dot.
            name = f"chat_{len(self._model.peft_config)}"
            with renamed_names_ignored():
                self._model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
            self._peft_names[adapter] = name

    def close(self) -> None:
        """Take off what was put on: afterwards the model is as it came. Waits for a reply that is being written."""
        with self._lock:
            if self._plain and isinstance(self._model, PeftModel):
                self._model = self._model.unload()
            for name in [name for name in self._peft_names if name != OWN]:
                peft_name = self._peft_names.pop(name)
                if not self._plain:
                    self._model.delete_adapter(peft_name)
