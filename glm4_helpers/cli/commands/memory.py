"""``memory``: how much memory fine-tuning takes, and what fits."""

from __future__ import annotations

import argparse

from . import add_json, add_settings, chosen_profile, count, gibibytes, show

HELP = "work out how much memory fine-tuning takes, and the largest batch that fits"
EXAMPLES = """\
examples:
  python -m glm4_helpers memory --profile glm-4-9b-lora             each part of the peak on one GPU
  python -m glm4_helpers memory --profile glm-4-9b-lora --formulas  with the formulas and where they are from
  python -m glm4_helpers memory --profile glm-4-9b-qlora --gpu-memory 16
  python -m glm4_helpers memory --profile glm-4-9b-full --gpus 8 --zero 3
  python -m glm4_helpers memory --profile glm-4-9b-lora --batch 4 --length 1024 --json

Nothing is loaded or measured: this is arithmetic. `python -m benchmarks.gpu` in the clone measures
on a GPU what it can."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument("--batch", type=count, metavar="N", help="rows in one step of one GPU (default: the profile's)")
    parser.add_argument(
        "--length", type=count, metavar="N", help="tokens a row (default: the profile's training.max_length)"
    )
    parser.add_argument("--gpus", type=count, metavar="N", help="how many GPUs train together (default: 1)")
    parser.add_argument(
        "--zero",
        type=int,
        choices=(0, 1, 2, 3),
        help="DeepSpeed's ZeRO stage: the GPUs divide 1 the optimizer, 2 gradients too, 3 weights too; 0 nothing "
        "(default: 0)",
    )
    parser.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="gradient checkpointing: compute activations again instead of keeping them (default: the profile's)",
    )
    parser.add_argument(
        "--quantization", choices=("nf4", "none"), help="weights in 4 bits, or not (default: the profile's)"
    )
    parser.add_argument(
        "--triton",
        action=argparse.BooleanOptionalAction,
        help="whether TRL's kernels run; they need Triton, which torch brings on Linux only (default: yes)",
    )
    parser.add_argument(
        "--device", choices=("gpu", "cpu"), help="what trains (default: a cpu for glm4-nano, a gpu for the others)"
    )
    parser.add_argument(
        "--gpu-memory",
        type=gibibytes,
        metavar="GIB",
        help="also find the largest batch that fits in so many GiB of a gpu; a card has less than its name says, see "
        "nvidia-smi",
    )
    parser.add_argument("--formulas", action="store_true", help="show each part's formula and its source")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    profile = chosen_profile(arguments)
    from ...machine import memory

    setting = memory.setting_of(
        profile,
        batch_size=arguments.batch,
        length=arguments.length,
        gpus=arguments.gpus,
        zero_stage=arguments.zero,
        gradient_checkpointing=arguments.checkpointing,
        triton=arguments.triton,
        device=arguments.device or _usual_device(profile, arguments.gpu_memory),
        quantization=arguments.quantization,
    )
    result = memory.estimate_memory(profile, setting)
    figures, lines = result.as_dict(), [memory.format_estimate(result, arguments.formulas)]
    if arguments.gpu_memory is not None:
        batch = memory.largest_batch(profile, arguments.gpu_memory, setting)
        figures["largest_batch"] = batch
        lines += ["", _fit(profile, arguments.gpu_memory, setting, batch)]
    show(arguments, figures, "\n".join(lines))
    return 0


def _usual_device(profile, gpu_memory: float | None) -> str:
    from ...machine.room import needs

    return "gpu" if gpu_memory is not None or needs(profile).gpu_memory_gib else "cpu"


def _fit(profile, gib: float, setting, batch: int) -> str:
    from ...machine import memory

    if batch:
        return f"Largest batch in {gib:g} GiB: {batch}."
    near = memory.nearest_fit(profile, gib, setting)
    return f"Not even one row fits in {gib:g} GiB. " + (
        f"This does: {memory.describe(near)}." if near else "No setting of this profile does."
    )
