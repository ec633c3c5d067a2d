"""Forecasts of the memory, devices, tokens, time and disk space that a run requires."""
