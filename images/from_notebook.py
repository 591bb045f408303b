"""Takes the before/after plot for the READMEs out of notebook 06, as it was last run and committed.

    python images/from_notebook.py

Draws nothing: the figures that are not measured come from draw.py, the screenshots from tests/test_browser.py.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "06_before_after_comparison.ipynb"
DRAWN_BY = "before_after_figure("
TARGET = ROOT / "images" / "before_after.png"


def plot(notebook: Path) -> bytes:
    """The PNG below the cell that draws the plot."""
    cells = nbformat.read(notebook, as_version=4).cells
    outputs = [output for cell in cells if DRAWN_BY in cell.source for output in cell.get("outputs", [])]
    found = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    if len(found) != 1:
        sys.exit(
            f"{notebook.name} holds {len(found)} pictures made by {DRAWN_BY}…): run it first, with make notebooks."
        )
    return base64.b64decode(found[0])


if __name__ == "__main__":
    TARGET.write_bytes(plot(NOTEBOOK))
    print(f"{TARGET.relative_to(ROOT)}: {TARGET.stat().st_size:,} bytes")
