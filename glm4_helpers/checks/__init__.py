"""Is it whole, does it belong, is it live: weights, adapters, chat templates, shapes. Doors: `models`, `chat_format`."""
