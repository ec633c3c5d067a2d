"""Start and end of the ranks of a run, error reports between ranks, and sharded checkpoints."""
