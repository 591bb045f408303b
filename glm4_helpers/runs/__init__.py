"""Makes a run safe to repeat: what it depends on, processes, checkpoints, results, callbacks, tracking.

Door: `training`. Nothing here builds a trainer.
"""
