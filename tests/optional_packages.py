"""Optional packages for the tests that need them. They lie apart from the rest: .ci/install and .ci/run say why.

A test asks here for the one it needs; where it is absent the test fails in CI and is skipped elsewhere.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

APART = Path(sys.prefix) / "packages-for-tests"
LM_EVAL = Path(sys.prefix) / "lm-eval"
TRANSFORMERS_4 = Path(sys.prefix) / "transformers-4"


def python_path(package):
    """PYTHONPATH for a process that needs DeepSpeed, bitsandbytes or swanboard."""
    paths = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    if (APART / package).is_dir():
        return os.pathsep.join([*paths, str(APART)])
    if importlib.util.find_spec(package) is None:
        _absent(f"{package} is not installed; .ci/install puts it into {APART}")
    return os.pathsep.join(paths)


def lm_eval():
    """PYTHONPATH for a process that runs lm-eval."""
    if LM_EVAL.is_dir():
        return _in_front(LM_EVAL)
    if importlib.util.find_spec("lm_eval") is None:
        _absent('lm-eval is not installed: python -m pip install -e ".[evaluation]"')
    return os.environ.get("PYTHONPATH", "")


def transformers_4():
    """PYTHONPATH for a process in which transformers is version 4."""
    if not TRANSFORMERS_4.is_dir():
        _absent(f"transformers 4 is not in {TRANSFORMERS_4}; .ci/run says how it gets there")
    return _in_front(TRANSFORMERS_4)


def _in_front(folder):
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def _absent(reason):
    (pytest.fail if os.environ.get("GLM4_REQUIRE_PACKAGES") == "1" else pytest.skip)(reason)
