"""How glm4-nano came to be: its small world, its data files and its pretraining. In the clone only, not installed."""

import glm4_helpers  # noqa: F401 - before torch, since it sets how torch's threads wait
