"""Docstrings of the core: each function that notebooks import names the section that shows it."""

import json
import re
from pathlib import Path

import pytest

import glm4_helpers

ROOT = Path(__file__).parent.parent
CORE = ("profiles", "data", "chat_format", "models", "held_out", "training", "generation")
NAMES = [
    name
    for name in glm4_helpers.__all__
    if getattr(getattr(glm4_helpers, name), "__module__", "") in {f"glm4_helpers.{module}" for module in CORE}
]


def section(notebook: str, number: str) -> str:
    """Text and code of one numbered section, with its subsections; empty where the notebook has no such heading."""
    (path,) = (ROOT / "notebooks").glob(f"{notebook}_*.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    found = re.search(rf"^##+ {re.escape(number)} .*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[0] if found else ""


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_names_a_section_that_shows_it(name):
    shown = re.search(r"\n\s*Shown in (\d\d), (\d\.\d)\.\s*\Z", getattr(glm4_helpers, name).__doc__ or "")
    assert shown, f"the docstring of {name} does not end with a line such as: Shown in 03, 3.3."
    assert re.search(rf"\b{name}\b", section(*shown.groups())), f"{name} does not occur in {shown[0].strip()}"


@pytest.mark.parametrize("module", CORE)
def test_code_in_docstrings_has_single_backticks(module):
    assert "``" not in (ROOT / f"glm4_helpers/{module}.py").read_text(encoding="utf-8")
