"""The operator `permute`."""
