"""Tensor descriptors (TMA) of the operands of a matmul, created on the host for each launch.

A descriptor created on the host is a launch argument like a size: it needs no device memory and no
allocator (`triton.set_allocator` sets one for the whole process, whose buffer would have to outlive
every stream that uses it), a CUDA graph that captures the launch keeps it, and nothing is
recompiled when a shape changes. It takes a few microseconds of host time per launch.

The hardware's requirements are checked here; operands that do not meet them are read through
pointers. Source: CUDA driver API, `cuTensorMapEncodeTiled`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from unimoe_kernels._triton.planned import Layout
from unimoe_kernels._triton.tiles import Tile

ALIGNMENT_BYTES = 16  # of the address and of every stride but the last
MAX_STRIDE_BYTES = 2**40
MAX_SIZE = 2**31 - 1  # coordinates are int32
MAX_RAGGED_ROWS = 2**30


class Source:
    """How a kernel reads tensors of one layout: through pointers or a tensor descriptor.

    Attributes:
        form: compile-time constant of the kernel: `"pointers"`, `"descriptor"`, `"by_column"` or
            `"by_row"`.

    Args:
        form: see Attributes.
        describe: creates the descriptor of a tensor; None for pointers.
    """

    __slots__ = ("_describe", "_fields", "form")

    def __init__(self, form: str, describe: Callable[[Tensor], TensorDescriptor] | None = None):
        self.form = form
        self._describe = describe
        self._fields: dict[str, object] = {}

    def of(self, tensor: Tensor) -> Tensor | TensorDescriptor:
        """Returns the tensor, or a descriptor of it.

        Everything except the address follows from the layout, so it is checked only once.
        """
        if self._describe is None:
            return tensor
        if not self._fields:
            made = self._describe(tensor)
            self._fields = {name: value for name, value in vars(made).items() if name != "base"}
            return made
        again = TensorDescriptor.__new__(TensorDescriptor)
        vars(again).update(self._fields, base=tensor)
        return again


POINTERS = Source("pointers")


def describable(layout: Layout) -> bool:
    """Returns whether TMA can read a tensor: 16-bit dtype, aligned, last stride 1."""
    *strides, last = layout.strides
    return (
        layout.dtype.itemsize == 2
        and last == 1
        and math.prod(layout.shape) > 0
        and max(layout.shape) <= MAX_SIZE
        and all(0 < 2 * stride < MAX_STRIDE_BYTES for stride in strides)
        and all(2 * stride % ALIGNMENT_BYTES == 0 for stride in strides)
        and layout.aligned
    )


def weight_source(weight: Layout, tile: Tile) -> Source:
    """Returns the source from which kernels read a weight `[E, N, K]` of any strides."""
    if tile.descriptors:
        if describable(weight):
            block = [1, tile.block_n, tile.block_k]
            return Source("by_column", lambda tensor: _describe(tensor, block))
        if describable(weight.transposed()):
            block = [1, tile.block_k, tile.block_n]
            return Source("by_row", lambda tensor: _describe(tensor.transpose(1, 2), block))
    return POINTERS


def rows_source(x: Layout, tile: Tile, top_k: int) -> Source:
    """Returns the source of rows `[N, K]`: pointers if rows are gathered (`top_k > 0`)."""
    if tile.descriptors and top_k == 0 and describable(x):
        block = [tile.block_m, tile.block_k]
        return Source("descriptor", lambda tensor: _describe(tensor, block))
    return POINTERS


def owned_source(x: Layout, tile: Tile, columns: int) -> Source:
    """Returns the source of blocks of `columns` of `[N, width]` for a sum over an expert's rows.

    The descriptor ends with the rows of the expert: rows of other experts must not enter the sum,
    not even multiplied by zero, because they may hold infinities or NaN.
    """
    if tile.descriptors and describable(x) and x.shape[0] <= MAX_RAGGED_ROWS:
        block = [tile.block_k, columns]
        return Source("descriptor", lambda tensor: create_ragged_descriptor(tensor, block))
    return POINTERS


def _describe(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)
