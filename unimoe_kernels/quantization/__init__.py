"""Quantised weight formats: rounding, packing and dequantisation in plain torch."""
