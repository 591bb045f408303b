"""What the first cell of every notebook runs: it puts the clone on the search path and installs missing packages.

It runs before the packages are there, so it needs Python's standard library only. Everything else is in glm4_helpers.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from importlib.metadata import distributions, version
from pathlib import Path

CLONE = Path(__file__).absolute().parents[1]
if str(CLONE) not in sys.path:
    sys.path.insert(0, str(CLONE))
os.environ.setdefault("GLM4_HOME", str(CLONE))

from glm4_helpers.support.errors import MachineError, show_errors_plainly

NEEDED = ("trl", "peft", "swanlab")
"""A host such as Colab has most packages, but hardly all of these."""

IN_USE = ("torch", "numpy", "transformers")
"""Packages that break a kernel when they are replaced after it has imported them."""


def install() -> None:
    """Install the course with pip and leave the host's own torch alone.

    Raises MachineError where pip fails, and where it replaced a package that this kernel is using.
    """
    in_use = {name: version(name) for name in IN_USE if name in sys.modules}
    kept = [f"torch=={found.version}" for found in distributions(name="torch")][:1]
    print("Installing the course's packages. This takes a minute or two.")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("\n".join(kept), encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(constraints), str(CLONE)]
        finished = subprocess.run(pip, capture_output=True, encoding="utf-8", errors="replace")
    if finished.returncode:
        said = [line for line in finished.stderr.splitlines() if line.startswith("ERROR")] or [finished.stderr.strip()]
        raise MachineError(
            f"pip could not install the course's packages. {said[0]}",
            "Switch the network on if it is off (Kaggle: Settings, Internet), and run this cell again. pip says more "
            f"in a terminal: python -m pip install '{CLONE}'",
        )
    importlib.invalidate_caches()
    replaced = [name for name, before in in_use.items() if version(name) != before]
    if replaced:
        raise MachineError(
            f"pip replaced packages that this kernel is using: {', '.join(replaced)}.",
            "Restart the kernel, then run the notebook again from its first cell.",
        )


show_errors_plainly()
if not all(map(importlib.util.find_spec, NEEDED)):
    install()
