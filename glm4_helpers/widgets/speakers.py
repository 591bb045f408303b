"""Base and fine-tuned model from one set of weights, one of them at a time.

Only adapters are switched here; the conversation and what is shown of it live in transcript and chat.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import ModelError
from ..models import adapter_off, check_adapter, gradients_as_found, load_adapter
from ..profiles import Profile

OWN = "as loaded"
"""The name of the adapter that a model came with."""


class Speakers:
    """One model whose adapters are switched on for an answer, and are otherwise as they were found.

    Adapters are read when they are first asked for. A plain base model gets them put on, stays the base model for
    whoever else uses it, and is given back without them by `close`.
    """

    def __init__(self, model: nn.Module, profile: Profile, adapters: Mapping[str, Path] | None = None) -> None:
        """Raises ModelError for a base model inside which another PeftModel has put an adapter."""
        self._came_with_adapter = isinstance(model, PeftModel)
        if not self._came_with_adapter and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ModelError(
                "This base model carries an adapter already.", "Give the model that load_adapter returned instead."
            )
        self._model = model
        self._trainable = [(weight, weight.requires_grad) for weight in model.parameters()]
        self._profile = profile
        self._lock = threading.RLock()
        self._folders = {name: Path(folder) for name, folder in (adapters or {}).items()}
        self._loaded = {OWN: model.active_adapter} if self._came_with_adapter else {}

    @property
    def adapters(self) -> list[str]:
        """Names that `speaking` knows, the model's own adapter first."""
        return list(dict.fromkeys([*(name for name in self._loaded if name == OWN), *self._folders]))

    @property
    def model(self) -> nn.Module:
        """The model as it is now, with or without adapters on it."""
        return self._model

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
            self._load(adapter)
            with self._switched_on(self._loaded[adapter]):
                yield self._model

    def close(self) -> None:
        """Take off what was put on: afterwards the model is as it came. Waits for an answer that is being written."""
        with self._lock:
            if not isinstance(self._model, PeftModel):
                return
            if not self._came_with_adapter:
                self._model = self._model.unload()
            for weight, trainable in self._trainable:
                weight.requires_grad_(trainable)
            for name in [name for name in self._loaded if name != OWN]:
                peft_name = self._loaded.pop(name)
                if self._came_with_adapter:
                    self._model.delete_adapter(peft_name)

    def _load(self, adapter: str) -> None:
        if adapter in self._loaded:
            return
        folder = self._folders[adapter]
        if not isinstance(self._model, PeftModel):
            self._model = load_adapter(self._model, folder, self._profile)
            self._model.base_model.disable_adapter_layers()
            self._loaded[adapter] = self._model.active_adapter
            return
        check_adapter(self._model, folder, self._profile)
        # PEFT's names become module names, which can't hold a dot.
        name = f"chat_{len(self._loaded)}"
        with warnings.catch_warnings():
            # As in models.load_adapter: PEFT reads an attribute that transformers has renamed.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            self._model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
        self._loaded[adapter] = name

    @contextmanager
    def _switched_on(self, name: str) -> Iterator[None]:
        before = self._model.active_adapter
        with gradients_as_found(self._model):
            if name != before:
                self._model.set_adapter(name, inference_mode=True)
            self._model.base_model.enable_adapter_layers()
            try:
                yield
            finally:
                if not self._came_with_adapter:
                    self._model.base_model.disable_adapter_layers()
                elif name != before:
                    self._model.set_adapter(before)
