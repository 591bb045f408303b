"""This machine's hardware, the memory and disk that training takes, and the doctor. Doors: `training`, `doctor`."""
