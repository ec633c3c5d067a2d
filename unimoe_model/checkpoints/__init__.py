"""Published checkpoints in and out; the only place that knows their names."""

from unimoe_model.checkpoints.in_memory import from_published, to_published

__all__ = ["from_published", "to_published"]
