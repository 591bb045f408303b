"""Optional packages for the tests that need them. They lie apart from the rest: .ci/install and .ci/run say why.

A test asks here for the one it needs; where it is absent the test fails in CI and is skipped elsewhere.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest

APART = Path(sys.prefix) / "packages-for-tests"
LM_EVAL = Path(sys.prefix) / "lm-eval"


def python_path(package):
    """PYTHONPATH for a process that needs DeepSpeed, bitsandbytes or swanboard."""
    paths = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    if (APART / package).is_dir():
        return os.pathsep.join([*paths, str(APART)])
    if importlib.util.find_spec(package) is None:
        absent(f"{package} is not installed; .ci/install puts it into {APART}")
    return os.pathsep.join(paths)


def import_from_lm_eval(module, monkeypatch):
    """A module of lm-eval in this process, for the length of one test."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(LM_EVAL)])
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        return absent(f'{error.name} is not installed: python -m pip install -e ".[evaluation]"')


def absent(reason):
    """Fail in CI, skip elsewhere."""
    (pytest.fail if os.environ.get("GLM4_REQUIRE_PACKAGES") == "1" else pytest.skip)(reason)
