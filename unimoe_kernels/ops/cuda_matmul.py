"""Selection of CUDA C++ matmul kernels, shared by all operators that have them.

There are two kernels. `few_rows` streams the weights of an expert through its few rows, is limited
by reading them, and runs on compute capability 8.0 and later. `sm90` multiplies tiles with wgmma,
which requires code compiled for 9.0a. Calls that neither supports run in Triton; `Choice.reason`
names the cause.

On an H100 (2026-11-27) the prototype of `sm90` took 0.96 to 1.08 of the time of Triton with its
best tiles in forward matmuls and the gradient of x, 0.80 to 1.03 in weight gradients and 0.87 to
1.20 in the gated backward. Its advantage is host time: a layer is one call.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from unimoe_kernels import _extension

# Whether these kernels are preferred to Triton when no backend is forced. Set it once the tests of
# tests/ops/test_gpu_cuda_matmul.py have passed on a GPU and the benchmarks there show an advantage.
PROVEN = False

#: Compiled operators that each selection requires.
GROUPED_MM = ("grouped_mm_sm90", "grouped_mm_few_rows")
WEIGHT_GRADIENT = ("grouped_mm_wgrad_sm90",)
LAYER = ("moe_mlp_cuda", "moe_mlp_cuda_inference")
LAYER_BACKWARD = ("moe_mlp_cuda_backward",)

# Largest mean number of rows per expert for which `few_rows` is used; csrc/cuda/moe_mlp.cu has the
# same number.
FEW_ROWS = 32
MOST_EXPERTS = 512
VECTOR = 8  # elements in the 16 bytes that TMA and vector copies move
MOST_SIZE = 2**30
MOST_ROWS = 2**31 - 2  # the end of the rows is a coordinate of a tensor map of 2^31 - 1 rows
MOST_STRIDE = 2**39  # elements; TMA's limit is 2^40 bytes
DTYPES = (torch.bfloat16, torch.float16)


class Gpu(NamedTuple):
    """Properties of device and build that the choice of a kernel depends on.

    Attributes:
        capability: compute capability of the device, such as (9, 0).
        archs: architectures for which the extension was compiled, such as ("8.0", "9.0a").
    """

    capability: tuple[int, int]
    archs: tuple[str, ...]


class Layout(NamedTuple):
    """Properties of a tensor that the choice of a kernel depends on."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool


class Choice(NamedTuple):
    """The kernel that runs a call, or the reason why neither supports it.

    Attributes:
        kernel: `"sm90"`, `"few_rows"` or None.
        reason: the property that neither kernel supports; empty if one does.
    """

    kernel: str | None
    reason: str = ""


# Stands in for the GPU of tensors that are not on one; set by tests.
STAND_IN: Gpu | None = None


def gpu_of(tensor: Tensor) -> Gpu | None:
    """Returns the GPU of a tensor, or the stand-in (None outside tests)."""
    return _gpu(tensor.device.index) if tensor.is_cuda else STAND_IN


@functools.cache
def _gpu(index: int) -> Gpu:
    return Gpu(torch.cuda.get_device_capability(index), split_archs(_compiled_archs()))


def _compiled_archs() -> str:
    return _extension.build_info().get("cuda_archs") or ""


def split_archs(archs: str) -> tuple[str, ...]:
    """Returns the architectures of a TORCH_CUDA_ARCH_LIST, without `+PTX`."""
    names = archs.replace(";", " ").split()
    return tuple(name.removesuffix("+PTX") for name in names)


def layout_of(tensor: Tensor) -> Layout:
    """Returns the layout of a tensor."""
    return Layout(tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16 == 0)


@functools.lru_cache(maxsize=1024)
def choose_product(gpu: Gpu | None, x: Layout, weight: Layout, has_bias: bool) -> Choice:
    """Chooses the kernel for `grouped_mm`.

    Args:
        gpu: GPU of the tensors.
        x: layout of `[N, D]`, contiguous.
        weight: layout of `[E, F, D]`.
        has_bias: whether there is a bias.
    """
    num_experts, _, _ = weight.shape
    few = x.shape[0] <= FEW_ROWS * num_experts and weight.strides[2] == 1
    transposed = weight.strides[2] != 1
    reason = (
        _refused("bias", has_bias)
        or _shared_reason(gpu, x.dtype, num_experts)
        or _rows_reason("x", x)
        or _weight_reason("weight", weight, transposed)
    )
    return _choice(gpu, few, reason)


@functools.lru_cache(maxsize=1024)
def choose_weight_gradient(
    gpu: Gpu | None, grad: Layout, x: Layout, num_experts: int, has_bias: bool
) -> Choice:
    """Chooses the kernel for `grouped_mm_wgrad`.

    Args:
        gpu: GPU of the tensors.
        grad: layout of `[N, F]`.
        x: layout of `[N, D]`.
        num_experts: E.
        has_bias: whether the gradient of a bias is required.
    """
    reason = (
        _refused("bias", has_bias)
        or _shared_reason(gpu, x.dtype, num_experts)
        or _contiguous_reason("grad", grad)
        or _contiguous_reason("x", x)
    )
    return _choice(gpu, False, reason)


@functools.lru_cache(maxsize=1024)
def choose_layer(
    gpu: Gpu | None,
    x: Layout,
    gate_up: Layout,
    down: Layout,
    top_k: int,
    activation: str,
    has_bias: bool,
    keep_hidden: bool,
) -> Choice:
    """Chooses the kernel for `moe_mlp`.

    Args:
        gpu: GPU of the tensors.
        x: layout of `[T, D]`, contiguous.
        gate_up: layout of `[E, 2F, D]`.
        down: layout of `[E, D, F]`.
        top_k: K.
        activation: as in `swiglu`.
        has_bias: whether there is a bias.
        keep_hidden: whether pre-activations are kept for a backward.
    """
    few = not keep_hidden and x.shape[0] * top_k <= FEW_ROWS * gate_up.shape[0]
    return _choice(gpu, few, _layer_reason(gpu, x, gate_up, down, top_k, activation, has_bias))


@functools.lru_cache(maxsize=1024)
def choose_layer_backward(
    gpu: Gpu | None,
    grad: Layout,
    x: Layout,
    gate_up: Layout,
    down: Layout,
    top_k: int,
    activation: str,
    has_bias: bool,
) -> Choice:
    """Chooses the kernel for `moe_mlp_backward`; see `choose_layer`, `grad` is `[T, D]`."""
    reason = _rows_reason("grad", grad) or _layer_reason(
        gpu, x, gate_up, down, top_k, activation, has_bias
    )
    return _choice(gpu, False, reason)


def _layer_reason(
    gpu: Gpu | None,
    x: Layout,
    gate_up: Layout,
    down: Layout,
    top_k: int,
    activation: str,
    has_bias: bool,
) -> str:
    gated = gate_up.shape[1] == 2 * down.shape[2]
    return (
        _refused("bias", has_bias)
        or ("" if activation == "silu" and gated else f"activation {activation}")
        or _shared_reason(gpu, x.dtype, gate_up.shape[0])
        or ("" if top_k else "no routed rows")
        or _rows_reason("x", x, top_k)
        or _weight_reason("gate_up_proj", gate_up, False)
        or _weight_reason("down_proj", down, False)
    )


def _choice(gpu: Gpu | None, few: bool, reason: str) -> Choice:
    if reason:
        return Choice(None, reason)
    if few:
        return Choice("few_rows")
    if gpu.capability != (9, 0):
        return Choice(None, f"compute capability {_name(gpu)} with many rows or a backward")
    if "9.0a" not in gpu.archs:
        return Choice(None, "the extension was not compiled for 9.0a")
    return Choice("sm90")


def _name(gpu: Gpu) -> str:
    return ".".join(map(str, gpu.capability))


def _refused(name: str, given: bool) -> str:
    return name if given else ""


def _shared_reason(gpu: Gpu | None, dtype: torch.dtype, num_experts: int) -> str:
    if gpu is None:
        return "no GPU"
    if gpu.capability < (8, 0):
        return f"compute capability {_name(gpu)}"
    if dtype not in DTYPES:
        return f"dtype {str(dtype).removeprefix('torch.')}"
    if not 1 <= num_experts <= MOST_EXPERTS:
        return f"{num_experts} experts"
    return ""


def _rows_reason(name: str, rows: Layout, copies: int = 1) -> str:
    if not 0 < rows.shape[0] * copies <= MOST_ROWS:
        return f"{rows.shape[0] * copies} rows"
    return _contiguous_reason(name, rows)


def _contiguous_reason(name: str, rows: Layout) -> str:
    width = rows.shape[1]
    if not _is_vectors(width):
        return f"width {width} of {name}"
    if rows.shape[0] > MOST_ROWS:
        return f"{rows.shape[0]} rows of {name}"
    if rows.strides[1] != 1 or (rows.shape[0] > 1 and rows.strides[0] != width):
        return f"strides {rows.strides} of {name}"
    if not rows.aligned:
        return f"address of {name}"
    return ""


def _weight_reason(name: str, weight: Layout, transposed: bool) -> str:
    num_experts, *sizes = weight.shape
    expert, *strides = weight.strides
    dense, apart = strides if transposed else reversed(strides)
    if not all(map(_is_vectors, sizes)):
        return f"shape {tuple(weight.shape)} of {name}"
    fits = dense == 1 and _is_stride(apart) and (num_experts == 1 or _is_stride(expert))
    if not fits:
        return f"strides {weight.strides} of {name}"
    if not weight.aligned:
        return f"address of {name}"
    return ""


def _is_vectors(size: int) -> bool:
    return 0 < size < MOST_SIZE and size % VECTOR == 0


def _is_stride(stride: int) -> bool:
    return 0 < stride < MOST_STRIDE and stride % VECTOR == 0
