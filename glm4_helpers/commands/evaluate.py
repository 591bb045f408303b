"""``evaluate``: scores on held-out rows, before and after fine-tuning."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import adapter_folder, add_json, add_settings, chosen_profile, show

HELP = "score the answers before and after fine-tuning on held-out rows"
EXAMPLES = """\
examples:
  python -m glm4_helpers evaluate                           the test half, before and after
  python -m glm4_helpers evaluate --half dev                the half that checkpoints are chosen on
  python -m glm4_helpers evaluate --adapter outputs/short
  python -m glm4_helpers evaluate --seeds 1 2 3             trains where needed; each seed, median and worst
  python -m glm4_helpers evaluate --json > scores.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument("--half", choices=("test", "dev"), default="test", help="which held-out half (default: test)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--adapter", type=Path, metavar="FOLDER", help="the adapter (default: the one that train made)")
    which.add_argument("--seeds", type=int, nargs="+", metavar="N", help="train with each of these seeds and score all")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.seeds:
        return _run_seeds(arguments)
    profile = chosen_profile(arguments)
    from ..evaluation import before_after, format_table

    result = before_after(profile, adapter_folder(arguments, profile), arguments.half)
    show(arguments, result, format_table(result))
    return 0


def _run_seeds(arguments: argparse.Namespace) -> int:
    """Each seed in a folder of its own; those that are trained already are only scored."""
    profiles = {seed: chosen_profile(arguments, **{"training.seed": seed}) for seed in arguments.seeds}
    from ..evaluation import before_after, format_table
    from ..paths import outputs_dir
    from ..training import train_or_load

    results = {}
    for seed, profile in profiles.items():
        trained = train_or_load(profile, output_dir=outputs_dir(profile.name, f"seed-{seed}"))
        results[seed] = before_after(profile, trained.adapter_dir, arguments.half)
        print(f"seed {seed}\n{format_table(results[seed])}\n")
    summary = median_and_worst(results.values())
    show(arguments, {"seeds": results, "summary": summary}, format_summary(summary))
    return 0


def median_and_worst(results: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Over several seeds, the median and the lowest accuracy and stop rate after fine-tuning, by held-out set."""
    after = [result["after"]["sets"] for result in results]
    figures = {}
    for name in after[0]:
        for key in ("accuracy", "stop_rate"):
            values = [_rate(sets[name][key]) for sets in after]
            if None in values:  # free text has no accuracy, only a stop rate
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
