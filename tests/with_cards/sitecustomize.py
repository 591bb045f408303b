"""Python runs this at its start where the folder is on PYTHONPATH: the process gets the cards of GLM4_TEST_CARDS."""

import os
import sys
from pathlib import Path

if os.environ.get("GLM4_TEST_CARDS"):
    sys.path.append(str(Path(__file__).parent.parent))
    from cards import install

    install(os.environ["GLM4_TEST_CARDS"].split(","))
