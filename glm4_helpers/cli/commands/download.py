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
  python -m glm4_helpers download --profile glm-4-9b-lora --check      only look at what is here
  python -m glm4_helpers download --profile glm-4-9b-lora --repository zai-org/glm-4-9b-chat-hf
                                                                to compare with

The model goes to weights/, into the folder of its name: glm-4-9b-lora, -qlora and -full share
weights/glm-4-9b-hf. Disk space is checked first: the model's size and 1 GiB to spare. Run the
same line again to resume an interrupted download. ModelScope has the model of those three
profiles, and needs the package modelscope (python -m pip install -e ".[modelscope]"). The
variables HF_ENDPOINT and MODELSCOPE_ENDPOINT do the same as --endpoint. glm4-nano, the default
profile, ships with the repository and needs no download."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_profile(parser)
    parser.add_argument(
        "--source",
        choices=("huggingface", "modelscope"),
        default="huggingface",
        help="which hub (default: huggingface)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--repository", metavar="OWNER/NAME", help="another repository, to weights/NAME (default: the profile's own)"
    )
    what.add_argument(
        "--check", action="store_true", help="download nothing; check that the profile's own model is complete"
    )
    parser.add_argument("--endpoint", metavar="URL", help="a mirror of the hub (default: the hub itself)")


def run(arguments: argparse.Namespace) -> int:
    profile = chosen_profile(arguments)
    from ...support.paths import home
    from .. import download

    if arguments.check:
        folder = home() / profile.base_model
        download.verify(folder, profile)
    else:
        folder = download.download(profile, arguments.source, arguments.repository, arguments.endpoint)
    print(f"Complete: {folder}")
    return 0
