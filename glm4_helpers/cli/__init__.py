"""The commands, with settings, download and export, which only they need. Door: `python -m glm4_helpers`."""
