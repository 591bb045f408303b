"""``chat``: the options; the conversation itself is in chat.terminal."""

from __future__ import annotations

import argparse
from dataclasses import replace

from . import adapter_folder, add_adapter, add_settings, chosen_profile, count, seed

HELP = "talk to the base model and the fine-tuned one in the terminal"
EXAMPLES = """\
examples:
  python -m glm4_helpers chat                 the fine-tuned model; /adapter off asks the base model
  python -m glm4_helpers chat --base          no adapter needed: the base model alone
  python -m glm4_helpers chat --temperature 0.6 --system 请用一句话回答。
  python -m glm4_helpers chat --profile glm-4-9b-lora --temperature 0.6 --repetition-penalty 1.2
  echo 你好 | python -m glm4_helpers chat     one line, one answer
  python -m glm4_helpers chat --delimiter === < questions.txt
                                              several lines a message, up to a line that is === and nothing else

In a terminal Alt+Enter (or Esc, then Enter) breaks the line, and pasted breaks are kept. Ctrl-C stops an answer.
/help lists the commands inside the chat."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    which = parser.add_mutually_exclusive_group()
    add_adapter(which)
    which.add_argument("--base", action="store_true", help="the base model alone, without an adapter")
    parser.add_argument(
        "--system", metavar="TEXT", help="a system prompt: what the model is told before all questions (default: none)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 always takes the likeliest token, 0.6 gives other answers each time (default: 0)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.8,
        metavar="P",
        help="with a temperature: draw from the likeliest tokens that make up this share (default: 0.8)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1 makes repeated tokens less likely (default: 1, none)",
    )
    parser.add_argument(
        "--seed", type=seed, metavar="N", help="with a temperature: the same answers each time (default: none)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=count,
        metavar="N",
        help="longest answer, in tokens (default: the profile's, 200 or 256)",
    )
    parser.add_argument(
        "--delimiter",
        metavar="TEXT",
        help="over a pipe: messages of several lines end with a line that is TEXT, and so do answers "
        "(default: each line is one)",
    )


def run(arguments: argparse.Namespace) -> int:
    profile = chosen_profile(arguments)
    from ...chat.terminal import run_chat
    from ...checks.adapters import check_trained_model
    from ...generation import Sampling

    adapter = None if arguments.base else adapter_folder(arguments, profile)
    if adapter is not None and profile.lora is None:  # full fine-tuning leaves a whole model and no adapter
        check_trained_model(adapter)
        profile, adapter = replace(profile, base_model=str(adapter.resolve())), None
    sampling = Sampling(
        arguments.max_new_tokens or profile.max_new_tokens,
        arguments.temperature,
        arguments.top_p,
        arguments.repetition_penalty,
        arguments.seed,
    )
    return run_chat(profile, adapter, sampling, arguments.system, arguments.delimiter)
