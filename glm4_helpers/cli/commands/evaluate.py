"""``evaluate``: scores on held-out rows, before and after fine-tuning."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...profiles import Profile
from ...support.errors import SettingError
from . import adapter_folder, add_adapter, add_json, add_settings, chosen_profile, count, show

HELP = "score the answers before and after fine-tuning on held-out rows"
EXAMPLES = """\
examples:
  python -m glm4_helpers evaluate                           the test set, before and after
  python -m glm4_helpers evaluate --half dev                the dev set, which checkpoints are chosen on
  python -m glm4_helpers evaluate --set test_data=mine.json     rows of your own
  python -m glm4_helpers evaluate --adapter outputs/short
  python -m glm4_helpers evaluate --seeds 1 2 3             trains where needed; each seed, median and worst
  python -m glm4_helpers evaluate --json > scores.json
  python -m glm4_helpers evaluate --profile glm-4-9b-lora --rows 100
  python -m glm4_helpers evaluate --profile glm-4-9b-lora --baseline glm-4-9b-chat-hf

Held-out rows are rows kept out of training. glm4-nano's answers are right or wrong. The other
profiles' data is free text: it gives the loss per answer token (lower is better), its perplexity
(e to that loss), the stop rate (the part of the answers that end by themselves), and exact match
(answers equal to the row's own).

Rows of your own (test_data) are a file that train could read, or a folder of such files; each file
is one set with its name. A row with a check is right or wrong by it:
  {"instruction": "...", "output": "好的。", "check": {"type": "one_of", "answers": ["好的。", "行。"]}}
The others are scored as free text. Rows whose question was trained are counted below the table.

Answers are written answer_batch_size (32) rows at a time, on a GPU fewer where its free memory
says so; the loss takes training.evaluation_batch_size rows. Public benchmarks such as C-Eval are
asked with lm-eval; README.md shows its line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument(
        "--half",
        choices=("test", "dev"),
        help="test_data, which no choice was made with, or dev_data, on which checkpoints are chosen (default: test)",
    )
    parser.add_argument(
        "--rows",
        type=count,
        metavar="N",
        help="how many of the rows that training held out, where there is no test_data (default: 200)",
    )
    which = parser.add_mutually_exclusive_group()
    add_adapter(which)
    which.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="train with each of these seeds and score all; "
        "those trained before (in outputs/PROFILE/seed-N) are only scored",
    )
    parser.add_argument(
        "--baseline",
        metavar="MODEL",
        help="a third model to compare with: a folder, a name in weights/, or a profile; `none` for none (default: "
        "the profile's chat_model, weights/glm-4-9b-chat-hf for those of glm-4-9b-hf, if it is there)",
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    profile = chosen_profile(arguments)
    _refuse_unused(arguments, profile)
    if arguments.seeds:
        return _run_seeds(arguments)
    adapter, baseline = adapter_folder(arguments, profile), _baseline(arguments, profile)
    from ...evaluation import before_after, format_table
    from ...held_out import FREE_TEXT_ROWS

    rows = arguments.rows or FREE_TEXT_ROWS
    result = before_after(profile, adapter, arguments.half or "test", row_count=rows, baseline=baseline)
    show(arguments, result, format_table(result))
    return 0


def _refuse_unused(arguments: argparse.Namespace, profile: Profile) -> None:
    """Raise SettingError for options that would be left aside in silence."""
    unused = {
        "can't be used with --seeds": ("rows", "baseline") if arguments.seeds else (),
        f"can't be used with {profile.name}, which has no test_data": () if profile.test_data else ("half",),
        f"can't be used with {profile.name}: all of test_data is scored": ("rows",) if profile.test_data else (),
    }
    for reason, names in unused.items():
        given = [f"--{name}" for name in names if getattr(arguments, name) is not None]
        if given:
            raise SettingError(f"{' and '.join(given)} {reason}.", "Leave it out, or see evaluate --help.")


def _baseline(arguments: argparse.Namespace, profile: Profile) -> Path | None:
    from ...evaluation import find_baseline

    return None if arguments.baseline == "none" else find_baseline(profile, arguments.baseline)


def _run_seeds(arguments: argparse.Namespace) -> int:
    """Each seed in a folder of its own; those that are trained already are only scored."""
    profiles = {seed: chosen_profile(arguments, **{"training.seed": seed}) for seed in arguments.seeds}
    from ...evaluation import before_after, format_table
    from ...support.paths import outputs_dir
    from ...training import train_or_load

    results = {}
    for seed, profile in profiles.items():
        trained = train_or_load(profile, output_dir=outputs_dir(profile.name, f"seed-{seed}"))
        results[seed] = before_after(profile, trained.adapter_dir, arguments.half or "test")
        print(f"seed {seed}\n{format_table(results[seed])}\n")
    summary = median_and_worst(results.values())
    show(arguments, {"seeds": results, "summary": summary}, format_summary(summary))
    return 0


def median_and_worst(results: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Median and lowest accuracy, exact match and stop rate after fine-tuning, over several seeds, by held-out set."""
    after = [result["after"]["sets"] for result in results]
    figures = {}
    for name in after[0]:
        for key in ("accuracy", "exact", "stop_rate"):
            values = [_rate(sets[name].get(key)) for sets in after]
            if None in values:  # rows with a check have no exact match, the others no accuracy
                continue
            figures[f"{name} {key.replace('_', ' ')}"] = {"median": statistics.median(values), "worst": min(values)}
    return figures


def _rate(figure: Any) -> float:
    return figure["accuracy"] if isinstance(figure, Mapping) else figure


def format_summary(summary: Mapping[str, Mapping[str, float]]) -> str:
    """``median_and_worst`` as a plain table."""
    lines = [f"{'after fine-tuning':32}{'median':>10}{'worst':>10}"]
    lines += [f"{name:32}{row['median']:>10.1%}{row['worst']:>10.1%}" for name, row in summary.items()]
    return "\n".join(lines)
