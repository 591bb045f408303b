"""What makes a run safe to repeat: whose rows judge it, what it depends on, checkpoints, results, callbacks, tracking.

Training is the door to this room; nothing here builds a trainer.
"""
