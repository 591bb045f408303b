"""Helpers of the GLM-4 fine-tuning course: the names that notebooks import; nothing else.

Modules and names are imported when they are first used (PEP 562), so that importing the package stays instant.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_MODULES = (
    "errors", "paths", "profiles", "chat_format", "datasets", "models", "environment", "generation", "tracking",
    "training", "evaluation", "plots", "widgets", "terminal_chat", "memory", "download", "export", "rehearsal",
    "exercises",
)  # fmt: skip
_ROOMS = {"tracking": "runs"}

_NAMES = {
    "CourseError": "errors",
    "show_errors_plainly": "errors",
    "home": "paths",
    "data_dir": "paths",
    "weights_dir": "paths",
    "outputs_dir": "paths",
    "get_profile": "profiles",
    "profile_names": "profiles",
    "profile_settings": "profiles",
    "render": "chat_format",
    "encode": "chat_format",
    "prompt_ids": "chat_format",
    "stop_ids": "chat_format",
    "read_rows": "datasets",
    "to_messages": "datasets",
    "load_messages": "datasets",
    "split": "datasets",
    "fingerprint": "datasets",
    "ledger": "datasets",
    "encode_rows": "datasets",
    "load_tokenizer": "models",
    "load_base_model": "models",
    "load_adapter": "models",
    "adapter_off": "models",
    "parameter_table": "models",
    "structure": "models",
    "answers": "generation",
    "continuations": "generation",
    "stream": "generation",
    "lora_config": "training",
    "sft_config": "training",
    "build_trainer": "training",
    "train": "training",
    "train_or_load": "training",
    "evaluate_rows": "evaluation",
    "before_after": "evaluation",
    "format_table": "evaluation",
    "before_after_figure": "plots",
    "check": "exercises",
    "prepare_notebook": "exercises",
    "write_metrics": "exercises",
}

__all__ = [*_MODULES, *_NAMES]


def __getattr__(name: str):
    if name in _NAMES:
        return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
    if name in _MODULES:
        room = f".{_ROOMS[name]}" if name in _ROOMS else ""
        return importlib.import_module(f"{room}.{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
