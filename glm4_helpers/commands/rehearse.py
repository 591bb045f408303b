"""``rehearse``: the whole path of a profile with random weights, before a GPU is rented."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import add_json, add_profile, chosen_profile, count, show

HELP = "try a profile's whole path at its true shape with random weights"
EXAMPLES = """\
examples:
  python -m glm4_helpers rehearse --profile glm-4-9b-lora --layers 2    minutes, 5 GiB of memory and disk
  python -m glm4_helpers rehearse --profile glm-4-9b-lora    all layers: 22 GiB of memory, 20 of disk
  python -m glm4_helpers rehearse --profile glm-4-9b-qlora --keep --folder /data/rehearsal

To be run before a GPU is rented. Builds the model with random weights, loads it, trains, kills
the training, resumes it, loads the adapter and answers. Nothing is downloaded, no GPU is needed,
and the answers mean nothing. The memory of each stage (RAM; CUDA_VISIBLE_DEVICES= in front keeps
it off a GPU) stands beside the estimate of `memory`. Linux and macOS only; glm-4-9b-qlora needs
bitsandbytes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_profile(parser)
    parser.add_argument("--layers", type=count, metavar="N", help="the first N layers only (default: all)")
    parser.add_argument("--tokens", type=count, default=256, metavar="N", help="tokens of each row (default: 256)")
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="where to build, empty or absent (default: outputs/rehearsal)")
    parser.add_argument("--keep", action="store_true", help="keep the folder when done (it is large)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    profile = chosen_profile(arguments)
    import shutil
    import sys
    from dataclasses import asdict

    from .. import rehearsal
    from ..environment import machine
    from ..paths import outputs_dir

    folder = arguments.folder or outputs_dir() / "rehearsal"
    foreign = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))

    def report(stage) -> None:
        print(f"{stage.name}: {stage.seconds:.0f} s, peak {stage.peak_gib:.2f} GiB", file=sys.stderr, flush=True)

    try:
        stages = rehearsal.rehearse(profile, folder, arguments.layers, arguments.tokens, report)
    finally:
        if not arguments.keep and not foreign:
            shutil.rmtree(folder, ignore_errors=True)
    figures = {"profile": profile.name, "machine": str(machine()), "stages": [asdict(stage) for stage in stages]}
    show(arguments, figures, f"{machine()}\n\n{rehearsal.format_stages(stages)}")
    return 0
