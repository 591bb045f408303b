"""``train``: fine-tune the profile's base model, or load what is already trained."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...support.paths import shown
from . import add_json, add_settings, chosen_profile, show

HELP = "fine-tune the base model and keep the adapter"
EXAMPLES = """\
examples:
  python -m glm4_helpers train                              glm4-nano, some minutes on a CPU
  python -m glm4_helpers train                              again: resumes, or says that it is done
  python -m glm4_helpers train --force                      from the start, whatever is there
  python -m glm4_helpers train --profile glm-4-9b-lora --set training.epochs=0.02 --output outputs/try
                                                            how long will it take?
  python -m glm4_helpers train --set training.epochs=1 --set lora.r=16 --output outputs/short
  python -m glm4_helpers train --config configs/train_nano.yaml --tracking cloud    after `swanlab login`
  python -m glm4_helpers train --set train_data=mine.json --output outputs/mine     rows of your own
  python -m glm4_helpers train --set train_data=mine.json --set dev_data=judge.json --output outputs/mine

The checkpoint with the lowest loss on the dev rows is kept. Rows of your own are judged by a part of
themselves, which is then not trained on: a tenth (glm4-nano; 5 % with the other profiles), or
--set dev_fraction=0.2. Where that would be fewer than four rows, all are trained on and the last
step is kept. --set dev_data=FILE judges by other rows, --set dev_data=null by none.

A run that was interrupted resumes from its newest checkpoint, also where its folder was moved to
another place or machine: give the folder as --output.

Where a finished adapter belongs to these settings, rows, base model and package versions, it is
kept, and nothing is trained. Where something has changed, it is trained again, and the new adapter
takes the place of the old one once it is whole."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="this run's folder: the result goes to adapter/ in it (full fine-tuning: model/), "
        "checkpoints to checkpoints/ (default: outputs/PROFILE)",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="the same as --set training.seed=N (default: the profile's, 42)"
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out rows that can't be read, and count them (default: stop and name them); "
        "the same as --set skip_bad_rows=true",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="train from the start even if a finished adapter is there; deletes its checkpoints",
    )
    parser.add_argument(
        "--no-resume",
        action="store_true",
        help="drop an unfinished run and start from the beginning (default: go on from its newest checkpoint); "
        "a finished one needs --force",
    )
    parser.add_argument(
        "--tracking",
        choices=("offline", "local", "cloud", "disabled"),
        default="offline",
        help="where SwanLab, which records losses and answers, keeps the run: offline (the default) in "
        "outputs/swanlog, without account or network; local for its dashboard, which is a separate package; "
        "cloud after `swanlab login`",
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    profile = chosen_profile(
        arguments, **{"training.seed": arguments.seed, "skip_bad_rows": arguments.skip_bad or None}
    )
    from accelerate import PartialState

    from ...training import train_or_load

    result = train_or_load(
        profile,
        force=arguments.force,
        output_dir=arguments.output,
        resume=not arguments.no_resume,
        tracking_mode=arguments.tracking,
    )
    if PartialState().is_main_process:
        show(arguments, figures(result), summary(result))
    # Left open, its threads can abort a process that is already done ("terminate called without an active exception").
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    return 0


def figures(result) -> dict:
    """What --json prints of a TrainingResult."""
    return {
        "adapter_dir": str(result.adapter_dir),
        "seconds": result.seconds,
        "final_loss": result.final_loss,
        "best_step": result.best_step,
        "log_history": result.log_history,
    }


def summary(result) -> str:
    """One line for the terminal."""
    return f"Result in {shown(result.adapter_dir)}: {result.kept}, trained in {result.seconds:.0f} s."
