"""JSON files of a run, written whole or not at all, and room on a disk.

Where files are is in paths.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from .errors import MachineError

GIB = 2**30


def require_disk(folder: Path, needed: float, what: str, fix: str) -> None:
    """Raise MachineError, which says that `what` needs them, unless `needed` bytes are free for `folder`."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise MachineError(
            f"{what} needs {needed / GIB:.1f} GiB of disk space; {free / GIB:.1f} GiB are free in {existing}.", fix
        )


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
