"""``export``: adapter and base model merged into a folder that other tools can serve."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import adapter_folder, add_adapter, add_json, add_settings, chosen_profile, show

HELP = "merge the adapter into the base model, and certify that the result answers the same"
EXAMPLES = """\
examples:
  python -m glm4_helpers export                                  to outputs/PROFILE/merged
  python -m glm4_helpers export --profile glm-4-9b-lora --output /data/my-glm
  python -m glm4_helpers export --check outputs/glm4-nano/merged      certify a folder again

The folder holds bfloat16 weights (18.8 GB for the 9B; room for them is checked first), tokenizer,
chat template, stop ids, a certificate, and a README with commands for `transformers serve`, vLLM
and PEFT. transformers 4.57 and 5 read it. It appears only if the files hold PEFT's merge to the
bit, and answer 32 prompts as base model and adapter do. For that the whole model is loaded in
bfloat16 (about 19 GiB for the 9B, for glm-4-9b-qlora too): on the GPU where it fits and bfloat16
is at home, else on the CPU; a line says which and why. Full fine-tuning leaves a whole model,
which needs no export."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    add_adapter(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, metavar="FOLDER", help="a new folder (default: outputs/PROFILE/merged)")
    where.add_argument("--check", type=Path, metavar="FOLDER", help="only compare a folder that was exported before")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    profile = chosen_profile(arguments)
    from dataclasses import asdict

    from ...support.paths import outputs_dir
    from .. import export

    adapter = adapter_folder(arguments, profile)
    if arguments.check:
        folder = arguments.check
        certificate = export.certify(profile, adapter, folder)
    else:
        folder = arguments.output or outputs_dir(profile.name) / "merged"
        certificate = export.export(profile, adapter, folder)
    show(arguments, {"folder": str(folder), **asdict(certificate)}, f"{certificate}\nCertified: {folder}")
    return 0
