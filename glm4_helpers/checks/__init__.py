"""Is it whole, does it belong, is it live: weights, adapters, templates, shapes. Doors: `models`, `chat_format`."""
