"""The operator `swiglu`."""
