"""How glm4-nano came to be: its small world, its data files and its pretraining. In the clone only, not installed."""
