"""Published checkpoints in and out, and an MoE out of dense models."""
