"""A conversation with the base or the fine-tuned model. Doors: the command `chat` and `widgets`."""
