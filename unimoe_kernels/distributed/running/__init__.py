"""Ranks of a run: their start and end, what they tell each other, checkpoints of all of them."""
