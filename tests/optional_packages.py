"""DeepSpeed and bitsandbytes for the tests that need them. They lie apart (.ci/install), since they print on import."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

APART = Path(sys.prefix) / "packages-for-tests"


def python_path(package):
    """PYTHONPATH for a process that needs the package; skips the test where it is not installed."""
    paths = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    if (APART / package).is_dir():
        return os.pathsep.join([*paths, str(APART)])
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; .ci/install puts it into {APART}")
    return os.pathsep.join(paths)
