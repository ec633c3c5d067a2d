"""Measures the fastest tiles of the matmul kernels on a GPU.

The command is `python -m unimoe_kernels.tune`. No other module imports this package; its output is
read by `_triton/table.py`.
"""
