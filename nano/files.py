"""The files of data/: what world, rows and text make, written down with their digests.

They are read back in data and held_out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from .cards import data_card
from .rows import build_rows
from .text import build_cloze, build_questions, pretraining_documents
from .world import SEED, World

PRETRAINING_TEXT = "pretrain.txt"
DOCUMENTS = 230_000
"""Pretraining documents of the shipped model: about 15 million characters."""


def json_text(rows: list[dict]) -> str:
    """One row a line, so that a diff shows rows."""
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def build_files(world: World, rows: Mapping[str, list[dict]]) -> dict[str, str]:
    """Every committed JSON file of data/ with its text; `rows` are `build_rows(world)`."""
    files = {f"{name}.json": json_text(members) for name, members in rows.items()}
    return {**files, "cloze.json": json_text(build_cloze(world)), "questions.json": json_text(build_questions(world))}


def write_data(folder: Path, documents: int = DOCUMENTS, seed: int = SEED) -> dict[str, str]:
    """Write the world to `folder` with its data card, pretraining text included; return the sha256 of each file."""
    world = World(seed)
    rows = build_rows(world)
    held_out = [row for name, members in rows.items() if name != "train" for row in members]
    text = "".join(line.replace("\n", "\\n") + "\n" for line in pretraining_documents(world, documents, held_out))
    contents = {**build_files(world, rows), PRETRAINING_TEXT: text}
    digests = {name: hashlib.sha256(content.encode()).hexdigest() for name, content in contents.items()}
    contents["README.md"] = data_card(rows, digests, seed, documents)
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8", newline="\n")
    return digests
