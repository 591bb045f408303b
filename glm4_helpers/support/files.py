"""JSON files, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

GIB = 2**30


def write_json(path: Path, content: Any) -> None:
    """Write a whole file or none: to a temporary name first, which then takes the place of `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any | None:
    """The content of a JSON file; None where it is absent or damaged. `weights.read_required_json` raises instead."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
