"""``nano``: how glm4-nano came to be: its data and its pretraining."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import add_json, count, show

HELP = "make glm4-nano's data or the base model itself again (the course does not need it)"
EXAMPLES = """\
examples:
  python -m glm4_helpers nano data          writes data/, the same bytes each time
  python -m glm4_helpers nano pretrain      then, from data/pretrain.txt: most of an hour; can be interrupted

Both write over what was shipped; `git checkout -- data weights/glm4-nano` brings it back."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    data = steps.add_parser("data", help="write the rows, the cloze facts and the pretraining text over data/")
    data.add_argument("--output", type=Path, metavar="FOLDER", help="where to write (default: data/ of the course)")
    data.add_argument("--documents", type=count, metavar="N", help="pretraining documents (default: those of glm4-nano)")
    add_json(data)
    pretrain = steps.add_parser("pretrain", help="pretrain the base model over weights/glm4-nano; goes on where it was interrupted")
    pretrain.add_argument("--output", type=Path, metavar="FOLDER", help="where to write (default: weights/glm4-nano)")
    pretrain.add_argument("--epochs", type=count, metavar="N", help="passes over the text (default: as for glm4-nano)")
    pretrain.add_argument("--compile", action="store_true", help="use torch.compile: needs a C++ compiler, a little faster")
    add_json(pretrain)


def run(arguments: argparse.Namespace) -> int:
    return {"data": _data, "pretrain": _pretrain}[arguments.step](arguments)


def _data(arguments: argparse.Namespace) -> int:
    from ..nano.files import DOCUMENTS, write_data
    from ..paths import data_dir

    folder = arguments.output or data_dir()
    digests = write_data(folder, arguments.documents or DOCUMENTS)
    lines = [f"{digest[:16]}  {name}" for name, digest in digests.items()]
    show(arguments, digests, "\n".join([f"Written to {folder} (sha256):", *lines]))
    return 0


def _pretrain(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from ..nano import pretrain as nano
    from ..paths import data_dir, outputs_dir, weights_dir

    folder = arguments.output or weights_dir("glm4-nano")
    text = data_dir() / "pretrain.txt"
    settings = nano.PretrainingSettings()
    settings = replace(settings, epochs=arguments.epochs or settings.epochs)
    documents = nano.read_documents(text)
    tokenizer = nano.build_tokenizer(nano.vocabulary(documents))
    blocks = nano.token_blocks(tokenizer, documents, settings.block)
    checkpoint = outputs_dir("pretraining") / "checkpoint.pt"
    result = nano.pretrain(tokenizer, blocks, checkpoint, settings, _report, arguments.compile)
    nano.save_base_model(result.model, tokenizer, folder)
    figures = _figures(result, tokenizer, settings, text)
    _write_card(folder, figures)
    figures["folder"] = str(folder)
    show(arguments, figures, f"{figures['parameters']:,} parameters, last loss {result.curve[-1]['loss']}, in {folder}")
    return 0


def _figures(result, tokenizer, settings, text: Path) -> dict[str, Any]:
    """All that the model card says, measured on the model as it was just trained."""
    from ..environment import machine
    from ..evaluation import cloze_accuracy, plain_questions_accuracy, read_plain

    return {
        "parameters": result.model.num_parameters(),
        "config": result.model.config.to_dict(),
        "tokens": result.steps * settings.blocks_per_step * settings.block,
        "tokens_per_step": settings.blocks_per_step * settings.block,
        "steps": result.steps,
        "minutes": result.seconds / 60,
        "cpu": f"{machine().cpu}, {machine().cores} cores",
        "curve": result.curve,
        "settings": asdict(settings),
        "text_sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "cloze": cloze_accuracy(result.model, tokenizer, read_plain("cloze")),
        "questions": plain_questions_accuracy(result.model, tokenizer, read_plain("questions")),
    }


def _write_card(folder: Path, figures: dict[str, Any]) -> None:
    from ..nano.cards import model_card

    (folder / "README.md").write_text(model_card(figures), encoding="utf-8")


def _report(step: int, steps: int, loss: float, seconds: float) -> None:
    print(f"step {step}/{steps}  loss {loss:.4f}  {seconds / 60:.1f} min", flush=True)
