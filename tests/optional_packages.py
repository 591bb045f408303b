"""DeepSpeed and bitsandbytes for the tests that need them. They lie apart (.ci/install), since they print on import."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

APART = Path(sys.prefix) / "packages-for-tests"


def python_path(package):
    """PYTHONPATH for a process that needs the package. Without it the test fails where CI requires it, else is skipped."""
    paths = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    if (APART / package).is_dir():
        return os.pathsep.join([*paths, str(APART)])
    if importlib.util.find_spec(package) is None:
        absent = pytest.fail if os.environ.get("GLM4_REQUIRE_PACKAGES") == "1" else pytest.skip
        absent(f"{package} is not installed; .ci/install puts it into {APART}")
    return os.pathsep.join(paths)
