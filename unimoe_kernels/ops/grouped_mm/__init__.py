"""The operator `grouped_mm`."""
