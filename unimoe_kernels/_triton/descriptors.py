"""Tensor descriptors (TMA) of the operands of a matmul, made on the host at each launch.

Made there a descriptor is an argument of the launch like a size: it takes no memory of the device
and no allocator (`triton.set_allocator` is one for the whole process, and its buffer would have to
outlive every stream that it is used on), a graph that captures the launch keeps it, and nothing is
compiled anew when a shape changes. It costs the host some microseconds a launch.

What the hardware demands is checked here, and whatever does not meet it goes through pointers.
Source: CUDA driver API, `cuTensorMapEncodeTiled`.
"""

from __future__ import annotations

from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from unimoe_kernels._triton.tiles import Tile

ALIGNMENT_BYTES = 16  # of the address and of every stride but the last
MAX_STRIDE_BYTES = 2**40
MAX_SIZE = 2**31 - 1  # coordinates are int32
MAX_RAGGED_ROWS = 2**30


def describable(tensor: Tensor) -> bool:
    """Returns whether a descriptor may read a tensor: 16-bit numbers, aligned, last stride 1."""
    *strides, last = tensor.stride()
    return (
        tensor.dtype.itemsize == 2
        and last == 1
        and tensor.numel() > 0
        and max(tensor.shape) <= MAX_SIZE
        and all(0 < 2 * stride < MAX_STRIDE_BYTES for stride in strides)
        and all(2 * stride % ALIGNMENT_BYTES == 0 for stride in strides)
        and tensor.data_ptr() % ALIGNMENT_BYTES == 0
    )


def describe_weight(weight: Tensor, tile: Tile) -> tuple[Tensor | TensorDescriptor, str]:
    """Returns what kernels read a weight `[E, N, K]` of any strides from, and the form of that."""
    if tile.descriptors:
        if describable(weight):
            return _describe(weight, [1, tile.block_n, tile.block_k]), "by_column"
        rows = weight.transpose(1, 2)
        if describable(rows):
            return _describe(rows, [1, tile.block_k, tile.block_n]), "by_row"
    return weight, "pointers"


def describe_rows(x: Tensor, tile: Tile, top_k: int) -> tuple[Tensor | TensorDescriptor, str]:
    """Returns what kernels read rows `[N, K]` from, and its form: pointers where they gather."""
    if tile.descriptors and top_k == 0 and describable(x):
        return _describe(x, [tile.block_m, tile.block_k]), "descriptor"
    return x, "pointers"


def describe_owned(
    x: Tensor, tile: Tile, columns: int, top_k: int
) -> tuple[Tensor | TensorDescriptor, str]:
    """Returns what a sum over rows reads blocks of `columns` of `[N, width]` from, and its form.

    The descriptor ends at the end of an expert, wherever that is: what other experts have in their
    rows must not enter the sum, not even times zero.
    """
    if tile.descriptors and top_k == 0 and describable(x) and x.shape[0] <= MAX_RAGGED_ROWS:
        return create_ragged_descriptor(x, [tile.block_k, columns]), "descriptor"
    return x, "pointers"


def _describe(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)
