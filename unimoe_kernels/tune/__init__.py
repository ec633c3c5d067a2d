"""Measures on a GPU which tiles the matmul kernels are fastest with.

`python -m unimoe_kernels.tune` is the command. Nothing else of the package imports this; what it
writes is read by `_triton/table.py`.
"""
