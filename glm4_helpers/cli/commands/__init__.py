"""The subcommands, one module each: ``add_arguments(parser)`` and ``run(arguments) -> int``.

The modules are light; what they call is imported in ``run``. Options that several of them share live here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from ...profiles import Profile, get_profile, profile_names
from ...support.errors import SettingError
from ..settings import settings_from_yaml, yaml_value


def add_profile(parser: argparse.ArgumentParser) -> None:
    """``--profile NAME``. Unknown names are left to ``get_profile``, which suggests the nearest."""
    parser.add_argument(
        "--profile",
        metavar="NAME",
        help=f"one of {', '.join(profile_names())} (default: the variable GLM4_PROFILE, else glm4-nano)",
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """``--profile``, ``--config`` and ``--set``: all that changes a profile."""
    add_profile(parser)
    parser.add_argument(
        "--config", metavar="FILE", help="a YAML file of settings such as configs/train_9b.yaml; may name the profile"
    )
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change one setting of the profile, such as training.epochs=1 or lora.r=16; wins over --config; may be "
        "repeated; profiles.py has all keys",
    )


def add_adapter(parser: argparse._ActionsContainer) -> None:
    """``--adapter FOLDER``, which `adapter_folder` reads."""
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="FOLDER",
        help="the adapter's folder, or the one that train was given as --output (default: outputs/PROFILE/adapter)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``: then standard output holds JSON only, and everything else goes to standard error."""
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, and nothing else, to stdout")


def count(text: str) -> int:
    """An option's value as a whole number from 1."""
    number = int(text)  # what argparse says of a ValueError names option and value
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return number


def seed(text: str) -> int:
    """An option's value as a seed, which torch and numpy take up to 2**32 - 1."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return number


def gibibytes(text: str) -> float:
    """An option's value as a number of GiB above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GiB above 0")
    return number


def chosen_profile(arguments: argparse.Namespace, **overrides: Any) -> Profile:
    """The profile of the command line. Later ones win: --config, --set, then ``overrides`` (those not None)."""
    config = getattr(arguments, "config", None)
    settings = settings_from_yaml(config) if config else {}
    name = settings.pop("name", None)
    for pair in getattr(arguments, "settings", []):
        key, value = parse_setting(pair)
        settings[key] = value
    settings.update({key: value for key, value in overrides.items() if value is not None})
    return get_profile(arguments.profile or name, **settings)


def adapter_folder(arguments: argparse.Namespace, profile: Profile) -> Path:
    """The folder of `--adapter` (or what is in it), else where `train` puts this profile's adapter or model."""
    from ...training import default_adapter_dir

    if arguments.adapter is None:
        return default_adapter_dir(profile)
    inside = default_adapter_dir(profile, arguments.adapter)  # given is what train was given as --output
    return inside if inside.is_dir() else arguments.adapter


def parse_setting(pair: str) -> tuple[str, Any]:
    """KEY=VALUE as key and value: numbers, true, false, null, [a, b], {a: b}, "text" as in YAML, the rest as text."""
    import yaml

    key, separator, text = pair.partition("=")
    if not separator or not key.strip():
        raise SettingError(f"--set {pair!r} is not KEY=VALUE.", "Write it as in --set training.epochs=1.")
    is_yaml = text in ("true", "false", "null") or text.startswith(("[", "{", '"', "'"))
    for meaning in (int, float, yaml_value if is_yaml else str):
        with contextlib.suppress(ValueError, yaml.YAMLError):
            return key.strip(), meaning(text)
    return key.strip(), text


def show(arguments: argparse.Namespace, figures: Any, text: str) -> None:
    """Print ``figures`` as JSON where --json was given, else ``text``."""
    if arguments.json:
        print(json.dumps(figures, ensure_ascii=False, indent=2), file=arguments.figures_to)
    else:
        print(text)


def quiet_libraries() -> None:
    """Keep the libraries' notes and warnings off the terminal; errors still show. Settings of the user win.

    Their progress bars show in a terminal only: in a pipe or a log they would be noise.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("DATASETS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
    ):
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
