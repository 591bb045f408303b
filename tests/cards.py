"""A card's answers without the card: torch.cuda says what a T4 or two of them would, and the CPU computes.

`install` patches this process. A process or notebook kernel of its own gets the cards of GLM4_TEST_CARDS where
tests/with_cards is on PYTHONPATH.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

STARTUP = Path(__file__).parent / "with_cards"
CUDA_130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
"""What PyTorch's builds for CUDA 13.0 hold code for (RELEASE.md)."""


@dataclass(frozen=True)
class Card:
    """Name, memory in GiB as the driver tells it, and compute capability."""

    name: str
    gib: float
    capability: tuple[int, int]


CARDS = {
    "T4": Card("Tesla T4", 14.7, (7, 5)),
    "V100": Card("Tesla V100-SXM2-32GB", 31.7, (7, 0)),
    "A4000": Card("NVIDIA RTX A4000", 15.7, (8, 6)),
    "L4": Card("NVIDIA L4", 22.0, (8, 9)),
    "A100": Card("NVIDIA A100-SXM4-80GB", 79.3, (8, 0)),
}


class Cuda:
    """The part of torch.cuda that answers. CUDA_VISIBLE_DEVICES counts until the driver is first asked."""

    def __init__(self, names):
        self.cards = [CARDS[name] for name in names]
        self.started = None
        self.initialized = False

    def visible(self):
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        if chosen is None:
            return self.cards
        return [self.cards[int(number)] for number in chosen.split(",") if number.strip()]

    def start(self):
        self.started = self.visible() if self.started is None else self.started
        return self.started

    def init(self):
        self.start()
        self.initialized = True

    def is_available(self):
        return bool(self.start())

    def is_initialized(self):
        return self.initialized

    def device_count(self):
        return len(self.started if self.initialized else self.visible())

    def get_device_properties(self, device=0):
        self.init()
        card = self.started[getattr(device, "index", device) or 0]
        major, minor = card.capability
        return SimpleNamespace(name=card.name, total_memory=int(card.gib * 2**30), major=major, minor=minor)

    def get_device_name(self, device=0):
        return self.get_device_properties(device).name

    def get_device_capability(self, device=0):
        properties = self.get_device_properties(device)
        return properties.major, properties.minor

    def is_bf16_supported(self, including_emulation=True):
        return including_emulation or self.get_device_properties().major >= 8

    def mem_get_info(self, device=0):
        total = self.get_device_properties(device).total_memory
        return total, total

    def get_arch_list(self):
        return CUDA_130


def install(names, patch=setattr, environment=os.environ.__setitem__):
    """Have torch answer for these cards; `monkeypatch.setattr` and `.setenv` make it end with the test."""
    import peft
    import torch
    from transformers import TrainingArguments

    from glm4_helpers.machine import gpus

    cuda = Cuda(names)
    for name in dir(cuda):
        if not name.startswith("_") and hasattr(torch.cuda, name):
            patch(torch.cuda, name, getattr(cuda, name))
    for name in ("manual_seed", "manual_seed_all", "set_device", "empty_cache", "set_rng_state", "set_rng_state_all"):
        patch(torch.cuda, name, lambda *_: None)
    for module in (torch.cuda, torch.cuda.random):
        patch(module, "get_rng_state", lambda *_: torch.empty(0, dtype=torch.uint8))
        patch(module, "get_rng_state_all", lambda *_: [])
    patch(torch.cuda, "current_device", lambda: 0)
    patch(torch.version, "cuda", "13.0")
    patch(gpus, "default_device", lambda: torch.device("cpu"))
    for module in (peft.peft_model, peft.utils.save_and_load):
        patch(module, "infer_device", lambda: "cpu")
    environment("ACCELERATE_TORCH_DEVICE", "cpu")
    patch(TrainingArguments, "device", property(lambda self: (self._setup_devices, torch.device("cpu"))[1]))
    patch(TrainingArguments, "n_gpu", property(lambda self: torch.cuda.device_count()))
    return cuda
