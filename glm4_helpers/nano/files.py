"""The files of data/: what world, rows and text make, written down with their digests.

Reading them back belongs to datasets.py and evaluation.py.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from glm4_helpers.nano.rows import build_rows
from glm4_helpers.nano.text import build_cloze, build_questions, pretraining_documents
from glm4_helpers.nano.world import SEED, World

DOCUMENTS = 165_000
"""Pretraining documents of the shipped model: about 10 million characters."""


def json_text(rows: list[dict]) -> str:
    """One row a line, so that a diff shows rows."""
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def build_files(world: World) -> dict[str, str]:
    """Every committed file of data/ with its text."""
    files = {f"{name}.json": json_text(rows) for name, rows in build_rows(world).items()}
    return {**files, "cloze.json": json_text(build_cloze(world)), "questions.json": json_text(build_questions(world))}


def write_data(folder: Path, documents: int = DOCUMENTS, seed: int = SEED) -> dict[str, str]:
    """Write the world to `folder`, pretraining text included, and return the sha256 of each file."""
    world = World(seed)
    held_out = [row for name, rows in build_rows(world).items() if name != "train" for row in rows]
    text = "".join(line.replace("\n", "\\n") + "\n" for line in pretraining_documents(world, documents, held_out))
    digests = {}
    for name, content in {**build_files(world), "pretrain.txt": text}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8", newline="\n")
        digests[name] = hashlib.sha256(content.encode()).hexdigest()
    return digests
