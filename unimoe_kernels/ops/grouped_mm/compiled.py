"""Default overload of `grouped_mm` and its weight gradient on a GPU.

A call that a CUDA C++ kernel supports runs there, all others in Triton or, if Triton is missing, in
plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unimoe_kernels import _backends
from unimoe_kernels.ops import cuda_matmul
from unimoe_kernels.ops.grouped_mm import reference

_backends.declare_compiled(
    "grouped_mm_sm90",
    "(Tensor x, Tensor weight, Tensor expert_offsets) -> Tensor",
    fake=lambda x, weight, expert_offsets: x.new_empty((x.shape[0], weight.shape[1])),
)
_backends.declare_compiled(
    "grouped_mm_wgrad_sm90",
    "(Tensor grad, Tensor x, Tensor expert_offsets) -> Tensor",
    fake=lambda grad, x, expert_offsets: x.new_empty(
        (expert_offsets.shape[0] - 1, grad.shape[1], x.shape[1])
    ),
)
# For few rows per expert: bfloat16 or float16, D a multiple of 8, no bias.
_backends.declare_compiled(
    "grouped_mm_few_rows",
    "(Tensor x, Tensor weight, Tensor expert_offsets) -> Tensor",
    fake=lambda x, weight, expert_offsets: x.new_empty((x.shape[0], weight.shape[1])),
)
_KERNELS = {
    "sm90": torch.ops.unimoe.grouped_mm_sm90.default,
    "few_rows": torch.ops.unimoe.grouped_mm_few_rows.default,
}


def grouped_mm(x: Tensor, weight: Tensor, expert_offsets: Tensor, bias: Tensor | None) -> Tensor:
    """Computes `grouped_mm`; arguments as in the operator."""
    gpu = cuda_matmul.gpu_of(x)
    if gpu is not None:
        layouts = cuda_matmul.layout_of(x), cuda_matmul.layout_of(weight)
        choice = cuda_matmul.choose_product(gpu, *layouts, bias is not None)
        if choice.kernel is not None:
            return _KERNELS[choice.kernel](x, weight, expert_offsets.contiguous())
    if _backends.has_triton("grouped_mm", x):
        from unimoe_kernels.ops.grouped_mm import kernel

        return kernel.grouped_mm(x, weight, expert_offsets, bias)
    return reference.grouped_mm(x, weight, expert_offsets, bias)


def grouped_mm_wgrad(
    grad: Tensor, x: Tensor, expert_offsets: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the weight and of the bias; arguments as in the operator."""
    gpu = cuda_matmul.gpu_of(x)
    if gpu is not None:
        layouts = cuda_matmul.layout_of(grad), cuda_matmul.layout_of(x)
        num_experts = expert_offsets.shape[0] - 1
        choice = cuda_matmul.choose_weight_gradient(gpu, *layouts, num_experts, has_bias)
        if choice.kernel is not None:
            run = torch.ops.unimoe.grouped_mm_wgrad_sm90.default
            return run(grad, x, expert_offsets.contiguous()), x.new_empty((0, grad.shape[1]))
    if _backends.has_triton("grouped_mm_wgrad", x):
        from unimoe_kernels.ops.grouped_mm import kernel

        return kernel.grouped_mm_wgrad(grad, x, expert_offsets, has_bias)
    return reference.grouped_mm_wgrad(grad, x, expert_offsets, has_bias)
