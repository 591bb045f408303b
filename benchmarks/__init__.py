"""The makers' measurements: run from the clone as `python -m benchmarks.NAME`; not installed with the course."""

import glm4_helpers  # noqa: F401 - before torch, since it sets how torch's threads wait
