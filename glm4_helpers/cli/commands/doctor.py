"""``doctor``: which profiles can this machine train?"""

from __future__ import annotations

import argparse

from . import add_json, add_profile, chosen_profile, show

HELP = "check whether this machine is enough for a profile"
EXAMPLES = """\
examples:
  python -m glm4_helpers doctor
  python -m glm4_helpers doctor --profile glm-4-9b-lora
  python -m glm4_helpers doctor --json

Packages, GPU, memory, disk and files are checked for the profile; then come all profiles and
whether this machine could train them. Nothing is installed or changed. The exit status is 0 if
every check for the profile passed, else 1."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_profile(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from ...machine.doctor import doctor

    report = doctor(chosen_profile(arguments))
    show(arguments, report.as_dict(), str(report))
    return 0 if report.ok else 1
