"""The commands and what only they need: settings, download, export. Door: `python -m glm4_helpers`."""
