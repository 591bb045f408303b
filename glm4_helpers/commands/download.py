"""``download``: a profile's base model to weights/."""

from __future__ import annotations

import argparse

from . import add_profile, chosen_profile

HELP = "fetch a profile's base model from Hugging Face or ModelScope"
EXAMPLES = """\
examples:
  python -m glm4_helpers download --profile glm-4-9b-lora                      18.8 GB, resumable
  python -m glm4_helpers download --profile glm-4-9b-lora --source modelscope
  python -m glm4_helpers download --profile glm-4-9b-lora --endpoint https://hf-mirror.com
  python -m glm4_helpers download --profile glm-4-9b-lora --check              only look at what is here

The variables HF_ENDPOINT and MODELSCOPE_ENDPOINT do the same as --endpoint. Disk space is checked first. An interrupted
download goes on when it is started again. glm4-nano ships with the repository and needs none."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_profile(parser)
    parser.add_argument("--source", choices=("huggingface", "modelscope"), default="huggingface", help="which hub")
    parser.add_argument("--repository", metavar="OWNER/NAME", help="another repository (default: the profile's)")
    parser.add_argument("--endpoint", metavar="URL", help="a mirror of the hub (default: the hub itself)")
    parser.add_argument("--check", action="store_true", help="download nothing; check that what is here is complete")


def run(arguments: argparse.Namespace) -> int:
    profile = chosen_profile(arguments)
    from .. import download
    from ..paths import home

    if arguments.check:
        folder = home() / profile.base_model
        download.verify(folder, profile)
    else:
        folder = download.download(profile, arguments.source, arguments.repository, arguments.endpoint)
    print(f"Complete: {folder}")
    return 0
