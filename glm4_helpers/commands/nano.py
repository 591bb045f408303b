"""``nano``: how glm4-nano came to be: its data and its pretraining."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import add_json, show

HELP = "make glm4-nano's data again, or pretrain it again"
EXAMPLES = """\
examples:
  python -m glm4_helpers nano data          writes data/, the same bytes each time
  python -m glm4_helpers nano pretrain      pretrains the base model from data/pretrain.txt; can be interrupted"""






def add_arguments(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    data = steps.add_parser("data", help="write the rows, the cloze facts and the pretraining text")
    data.add_argument("--output", type=Path, metavar="FOLDER", help="where to write (default: data/ of the course)")
    data.add_argument("--documents", type=int, default=DOCUMENTS, metavar="N", help="pretraining documents to write")
    add_json(data)
    pretrain = steps.add_parser("pretrain", help="pretrain the base model")
    pretrain.add_argument("--output", type=Path, metavar="FOLDER", help="where to write (default: weights/glm4-nano)")
    add_json(pretrain)


def run(arguments: argparse.Namespace) -> int:
    return {"data": _data, "pretrain": _pretrain}[arguments.step](arguments)


def _data(arguments: argparse.Namespace) -> int:
    from ..nano.world import write_data
    from ..paths import data_dir

    folder = arguments.output or data_dir()
    digests = write_data(folder, arguments.documents)
    lines = [f"{digest[:16]}  {name}" for name, digest in digests.items()]
    show(arguments, digests, "\n".join([f"Written to {folder} (sha256):", *lines]))
    return 0


def _pretrain(arguments: argparse.Namespace) -> int:
    from ..nano import pretrain as nano
    from ..paths import data_dir, outputs_dir, weights_dir

    folder = arguments.output or weights_dir("glm4-nano")
    settings = nano.PretrainingSettings()
    documents = nano.read_documents(data_dir() / "pretrain.txt")
    tokenizer = nano.build_tokenizer(set().union(*documents))
    blocks = nano.token_blocks(tokenizer, documents, settings.block)
    model, curve = nano.pretrain(tokenizer, blocks, outputs_dir("pretraining") / "checkpoint.pt", settings, _report)
    nano.save_base_model(model, tokenizer, folder)
    figures = {"folder": str(folder), "parameters": model.num_parameters(), "curve": curve}
    show(arguments, figures, f"{figures['parameters']:,} parameters, last loss {curve[-1]['loss']}, in {folder}")
    return 0


def _report(step: int, steps: int, loss: float, seconds: float) -> None:
    print(f"step {step}/{steps}  loss {loss:.4f}  {seconds / 60:.1f} min", flush=True)
