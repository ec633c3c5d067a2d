"""The operator `grouped_mm_quantized`."""
