"""The command line: ``python -m glm4_helpers`` and ``glm4-helpers``.

Parsing and the printing of errors; each subcommand lives in commands/ and imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..machine.gpus import ignore_leftovers
from ..profiles import get_profile, profile_names
from ..support.errors import CourseError

COMMANDS = ("doctor", "download", "memory", "train", "evaluate", "chat", "export", "course")

EXAMPLES = """\
examples:
  python -m glm4_helpers doctor           which profiles can this machine train?
  python -m glm4_helpers train            fine-tune glm4-nano on the CPU
  python -m glm4_helpers evaluate         scores before and after, on rows never trained on
  python -m glm4_helpers COMMAND --help   the options of a command, with examples

profiles, one model with its data and settings each; --profile NAME goes after the command:
{profiles}

The base model is the one before fine-tuning; the adapter is the small set of weights that LoRA
trains in addition."""


def profile_lines() -> str:
    """The profiles, a line each."""
    return "\n".join(f"  {name:16}{get_profile(name).title}" for name in profile_names())


class Parser(argparse.ArgumentParser):
    """argparse, with errors in the form that the course's own have."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        fix = f"See {self.prog} --help."
        if unknown:
            near = difflib.get_close_matches(unknown[1], re.findall(r"[\w-]+", unknown[2]), 1)
            fix = f"Did you mean {near[0]}? {fix}" if near else fix
        self.exit(2, f"error: {message}\nFix: {fix}\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands; light, whatever they will import."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="glm4-helpers",
        description="Fine-tune GLM-4 models and measure their answers before and after.",
        epilog=EXAMPLES.format(profiles=profile_lines()),
        formatter_class=layout,
    )
    parser.add_argument("--version", action="version", version=f"glm4-helpers {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name in COMMANDS:
        module = importlib.import_module(f".commands.{name}", __package__)
        command = commands.add_parser(
            name, help=module.HELP, description=_sentence(module.HELP), epilog=module.EXAMPLES, formatter_class=layout
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None, parser: argparse.ArgumentParser | None = None) -> int:
    """Run one command and return its exit status: 0, 1 (a check failed), 2 (an error to fix) or 130 (Ctrl-C).

    ``parser`` None takes the course's own commands; each command of another one sets ``run``, too.
    """
    _write_utf8()
    ignore_leftovers()
    arguments = (parser or build_parser()).parse_args(argv)
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except CourseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__package__):
            raise
        print(f"error: The package {error.name} is not installed for {sys.executable}.", file=sys.stderr)
        print('Fix: python -m pip install -c constraints.txt -e ".[test]" in the clone.', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone. Without this, Python complains once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}.", file=sys.stderr)
        print("Fix: Check the path, its permissions and the free space there.", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    from .commands import quiet_libraries

    quiet_libraries()
    if not getattr(arguments, "json", False):
        return arguments.run(arguments)
    # Libraries print to stdout as they like; the figures alone go to the real one.
    arguments.figures_to = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        return arguments.run(arguments)


def _write_utf8() -> None:
    """Chinese goes through pipes as UTF-8, also where the system's own encoding is another (Windows)."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and (stream.encoding or "").lower().replace("-", "") != "utf8":
            stream.reconfigure(encoding="utf-8", errors="replace")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


if __name__ == "__main__":
    sys.exit(main())
