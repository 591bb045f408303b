"""The commands `python -m nano data` and `python -m nano pretrain`: options, and what is printed.

Errors are printed as the course's own command line prints them.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from glm4_helpers.cli.commands import add_json, count, show
from glm4_helpers.cli.main import Parser
from glm4_helpers.cli.main import main as run_command

EXAMPLES = """\
examples:
  python -m nano data          writes data/, the same bytes each time
  python -m nano pretrain      then, from data/pretrain.txt: most of an hour; can be interrupted

Both write over what was shipped; `git checkout -- data weights/glm4-nano` brings it back."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of both commands."""
    parser = Parser(
        prog="python -m nano",
        description="Make glm4-nano's data or the base model itself again (the course does not need it).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="COMMAND", parser_class=Parser)
    data = steps.add_parser("data", help="write the rows, the cloze facts and the pretraining text over data/")
    data.add_argument("--output", type=Path, metavar="FOLDER", help="where to write (default: data/ of the course)")
    data.add_argument("--documents", type=count, metavar="N", help="pretraining documents (default: as for glm4-nano)")
    data.set_defaults(run=make_data)
    training = steps.add_parser("pretrain", help="pretrain the base model over weights/glm4-nano, or resume it")
    training.add_argument("--output", type=Path, metavar="FOLDER", help="where to write (default: weights/glm4-nano)")
    training.add_argument("--epochs", type=count, metavar="N", help="passes over the text (default: as for glm4-nano)")
    training.add_argument("--compile", action="store_true", help="torch.compile: needs a C++ compiler, a bit faster")
    training.set_defaults(run=make_model)
    add_json(data)
    add_json(training)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status, as `glm4_helpers.cli.main.main` does."""
    return run_command(argv, build_parser())


def make_data(arguments: argparse.Namespace) -> int:
    """Write data/ and print the digests of its files."""
    from glm4_helpers.support.paths import data_dir

    from .files import DOCUMENTS, write_data

    folder = arguments.output or data_dir()
    digests = write_data(folder, arguments.documents or DOCUMENTS)
    lines = [f"{digest[:16]}  {name}" for name, digest in digests.items()]
    show(arguments, digests, "\n".join([f"Written to {folder} (sha256):", *lines]))
    return 0


def make_model(arguments: argparse.Namespace) -> int:
    """Pretrain the base model, write it with its model card, and print what the card says."""
    from glm4_helpers.support.paths import data_dir, outputs_dir, weights_dir

    from . import pretrain as nano
    from .cards import model_card

    folder = arguments.output or weights_dir("glm4-nano")
    text = data_dir() / "pretrain.txt"
    settings = nano.PretrainingSettings()
    settings = replace(settings, epochs=arguments.epochs or settings.epochs)
    documents = nano.read_documents(text)
    tokenizer = nano.build_tokenizer(nano.vocabulary(documents))
    blocks = nano.token_blocks(tokenizer, documents, settings.block)
    checkpoint = outputs_dir("pretraining") / "checkpoint.pt"
    result = nano.pretrain(tokenizer, blocks, checkpoint, settings, report, arguments.compile)
    nano.save_base_model(result.model, tokenizer, folder)
    measured = measurements(result, tokenizer, settings, text)
    (folder / "README.md").write_text(model_card(measured), encoding="utf-8")
    last = result.curve[-1]["loss"]
    measured["folder"] = str(folder)
    show(arguments, measured, f"{measured['parameters']:,} parameters, last loss {last}, in {folder}")
    return 0


def measurements(result, tokenizer, settings, text: Path) -> dict[str, Any]:
    """All that the model card says, measured on the model as it was just trained."""
    from glm4_helpers.evaluation import cloze_accuracy, plain_questions_accuracy
    from glm4_helpers.held_out import read_plain
    from glm4_helpers.machine.hardware import this_machine

    return {
        "parameters": result.model.num_parameters(),
        "config": result.model.config.to_dict(),
        "tokens": result.steps * settings.blocks_per_step * settings.block,
        "tokens_per_step": settings.blocks_per_step * settings.block,
        "steps": result.steps,
        "minutes": result.seconds / 60,
        "cpu": f"{this_machine().cpu}, {this_machine().cores} cores",
        "curve": result.curve,
        "settings": asdict(settings),
        "text_sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "cloze": cloze_accuracy(result.model, tokenizer, read_plain("cloze")),
        "questions": plain_questions_accuracy(result.model, tokenizer, read_plain("questions")),
    }


def report(step: int, steps: int, loss: float, seconds: float) -> None:
    """Print how far the pretraining is."""
    print(f"step {step}/{steps}  loss {loss:.4f}  {seconds / 60:.1f} min", flush=True)


if __name__ == "__main__":
    sys.exit(main())
