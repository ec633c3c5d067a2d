"""Tensor descriptors (TMA) of the operands of a matmul, made on the host at each launch.

Made there a descriptor is an argument of the launch like a size: it takes no memory of the device
and no allocator (`triton.set_allocator` is one for the whole process, and its buffer would have to
outlive every stream that it is used on), a graph that captures the launch keeps it, and nothing is
compiled anew when a shape changes. It costs the host some microseconds a launch.

What the hardware demands is checked here, and whatever does not meet it goes through pointers.
Source: CUDA driver API, `cuTensorMapEncodeTiled`.
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
    """What kernels read tensors of one layout from.

    Attributes:
        form: constant of the kernel: `"pointers"`, or a form of descriptor.

    Args:
        form: see there.
        describe: makes the descriptor of a tensor; None for pointers.
    """

    __slots__ = ("_describe", "_fields", "form")

    def __init__(self, form: str, describe: Callable[[Tensor], TensorDescriptor] | None = None):
        self.form = form
        self._describe = describe
        self._fields: dict[str, object] = {}

    def of(self, tensor: Tensor) -> Tensor | TensorDescriptor:
        """Returns the tensor, or a descriptor of it.

        All but its address follows from the layout: it is checked once.
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
    """Returns whether a descriptor may read a tensor: 16-bit numbers, aligned, last stride 1."""
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
    """Returns what kernels read a weight `[E, N, K]` of any strides from."""
    if tile.descriptors:
        if describable(weight):
            block = [1, tile.block_n, tile.block_k]
            return Source("by_column", lambda tensor: _describe(tensor, block))
        if describable(weight.transposed()):
            block = [1, tile.block_k, tile.block_n]
            return Source("by_row", lambda tensor: _describe(tensor.transpose(1, 2), block))
    return POINTERS


def rows_source(x: Layout, tile: Tile, top_k: int) -> Source:
    """Returns what kernels read rows `[N, K]` from: pointers where they gather (`top_k > 0`)."""
    if tile.descriptors and top_k == 0 and describable(x):
        block = [tile.block_m, tile.block_k]
        return Source("descriptor", lambda tensor: _describe(tensor, block))
    return POINTERS


def owned_source(x: Layout, tile: Tile, columns: int) -> Source:
    """Returns what a sum over rows reads blocks of `columns` of `[N, width]` from.

    The descriptor ends at the end of an expert, wherever that is: what other experts have in their
    rows must not enter the sum, not even times zero.
    """
    if tile.descriptors and describable(x) and x.shape[0] <= MAX_RAGGED_ROWS:
        block = [tile.block_k, columns]
        return Source("descriptor", lambda tensor: create_ragged_descriptor(tensor, block))
    return POINTERS


def _describe(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)
