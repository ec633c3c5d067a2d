"""The operator `unpermute`."""
