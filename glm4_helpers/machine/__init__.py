"""What this machine is, what fits on it, and the doctor. Doors: `training` and the command `doctor`."""
