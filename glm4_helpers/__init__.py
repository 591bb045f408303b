"""Helpers of the GLM-4 fine-tuning course: every name that notebooks import, and nothing else.

A name is imported when it is first used (PEP 562), so that importing the package stays instant.
"""

from __future__ import annotations

import importlib
import os

# Threads that wait for one another spin for a millisecond before they sleep, and keep the last one from its core where
# another program takes a core: a step then took 7 to 30 times as long, now three times. To sleep sooner still would
# slow a quiet machine. libgomp reads this when torch is imported; benchmarks.speed measures it.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

__version__ = "0.1.0"

_NAMES = {
    "support.errors": ("CourseError",),
    "support.paths": ("home", "outputs_dir"),
    "support.files": ("read_json", "write_json"),
    "profiles": ("get_profile",),
    "data": ("load_messages", "read_rows", "to_messages", "encode_rows"),
    "rows.report": ("ledger",),
    "chat_format": ("IGNORE", "encode", "prompt_ids", "render"),
    "checks.chat_template": ("CHAT_TEMPLATE",),
    "models": ("load_tokenizer", "load_base_model", "load_adapter", "adapter_off", "dtype_reason"),
    "checks.weights": ("base_folder", "check_weights", "weight_files"),
    "checks.adapters": ("check_target_modules", "save_adapter_facts"),
    "checks.shapes": ("meta_model", "parameter_table", "structure"),
    "held_out": ("read_held_out", "read_plain", "training_overlap"),
    "training": ("lora_config", "sft_config", "build_trainer", "train_or_load", "default_adapter_dir"),
    "runs.checkpoints": ("ANSWERS_FILE",),
    "runs.tracking": ("start_run", "tracking_callback", "finish_run"),
    "generation": ("Answer", "answers", "continuations"),
    "evaluation": (
        "Rate",
        "cloze_accuracy",
        "evaluate_rows",
        "format_table",
        "is_right",
        "paired_test",
        "score_as_text",
        "score_model",
        "wilson_interval",
    ),
    "plots": (
        "before_after_figure",
        "checkpoints_figure",
        "grid_figure",
        "kind_label",
        "kinds_figure",
        "kinds_of_rows_figure",
        "lengths_figure",
        "loss_figure",
        "memory_figure",
        "parameter_figure",
        "seconds_figure",
        "surprise_figure",
        "sweep_figure",
    ),
    "widgets": ("chat_box", "token_boxes", "token_view", "token_view_figure"),
    "machine.hardware": ("this_machine",),
    "machine.gpus": ("native_bfloat16",),
    "machine.doctor": ("doctor",),
    "machine.memory": ("estimate_memory", "setting_of"),
    "notebook": ("check", "prepare_notebook", "show_table", "write_metrics"),
}

_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [*_HOMES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
