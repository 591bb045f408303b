"""Checks of weights, adapters, chat templates, values and shapes. Doors: `models`, `training`, `chat_format`."""
