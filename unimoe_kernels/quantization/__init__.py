"""Formats of quantised weights: how numbers are rounded, packed and read back, in plain torch."""
