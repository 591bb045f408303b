"""The arrows of the house: a unit, which is a core module or a room, imports only what images/house.json allows."""

import ast
import json
import os
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

PACKAGE = ROOT / "glm4_helpers"
HOUSE = json.loads((ROOT / "images" / "house.json").read_text(encoding="utf-8"))
ENTRY = {"__init__": [], "__main__": ["cli"]}
"""The package's list of names and `python -m glm4_helpers`; neither is a unit."""


def imports(file):
    """Line and full name of each import in the file, also within functions."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def test_every_import_is_an_arrow_that_the_house_allows():
    units, wrong = HOUSE["arrows"], []
    unused = {(unit, to) for unit, allowed in units.items() for to in allowed}
    for file in sorted(PACKAGE.rglob("*.py")):
        unit = file.relative_to(PACKAGE).with_suffix("").parts[0]
        for line, name in imports(file):
            top, _, rest = name.partition(".")
            to = rest.partition(".")[0] if top == PACKAGE.name else top
            unused.discard((unit, to))
            inside = top == PACKAGE.name and to not in ("__version__", unit)
            if top in ("nano", "benchmarks", "notebooks") or inside and to not in (ENTRY | units).get(unit, ()):
                wrong.append(f"{file.relative_to(ROOT)}:{line}: {unit} -> {to}")
    assert not wrong, "arrows that images/house.json does not allow:\n" + "\n".join(wrong)
    assert not unused, f"arrows in images/house.json that no import draws: {sorted(unused)}"


def test_the_house_lists_every_unit_and_has_no_circle():
    TopologicalSorter(HOUSE["arrows"]).prepare()  # raises CycleError, which names the circle
    units = {file.stem for file in PACKAGE.glob("*.py")} | {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    core = [module for module, _ in HOUSE["core"]]
    assert set(HOUSE["arrows"]) == {*core, *HOUSE["rooms"]} == units - set(ENTRY)


@pytest.mark.parametrize(
    "way_in", ["import glm4_helpers", "import nano", "import benchmarks", "runpy.run_path('notebooks/start.py')"]
)
@pytest.mark.parametrize(("own", "wanted"), [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_every_way_in_sets_how_threads_wait_before_torch_reads_it(way_in, own, wanted):
    """A thread that spins keeps the core which the last one waits for; torch reads the setting when it is imported."""
    said = f"import os, runpy, sys; {way_in}; print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    others = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run(
        [sys.executable, "-c", said], cwd=ROOT, env={**others, **own}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", wanted]
