"""One conversation, in a terminal or a notebook. Doors: the command `chat` and `widgets`."""
