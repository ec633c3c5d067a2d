"""`permute`: token rows copied into expert order."""

from __future__ import annotations

from torch import Tensor

from unimoe_kernels import _backends, _checks
from unimoe_kernels.ops.expert_sort.op import ExpertSort
from unimoe_kernels.ops.permute import reference


def permute(x: Tensor, sort: ExpertSort, top_k: int) -> Tensor:
    """Copies every token once for each of its experts, grouped by expert.

    `out[i] = x[sort.row_order[i] // top_k]` for rows that belong to one of the E experts; the
    remaining rows, from `sort.expert_offsets[E]` on, are zero.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> sort = expert_sort(torch.tensor([[0, 2], [2, 1], [0, 1]]), 3)
        >>> permute(x, sort, top_k=2).flatten().tolist()
        [0.0, 2.0, 1.0, 2.0, 0.0, 1.0]

    Args:
        x: `[T, D]`, float16, bfloat16, float32 or float64, any strides.
        sort: Result of `expert_sort` on ids `[T, K]`, same device as `x`.
        top_k: Number of experts per token K.

    Returns:
        `[N, D]` with `N = T * K`, dtype of `x`, contiguous.

    Raises:
        ValueError: If `x` is not 2-D, `top_k` is less than 1, `sort` does not have `T * top_k` rows
            or is on another device.
        TypeError: If `x` has a dtype that is not listed above.

    Note:
        Differentiable in `x`. The backward sums the K rows of a token in choice order with float32
        (float64 for float64) and is deterministic.
    """
    _checks.check_tensor("x", x, "[T, D]")
    _checks.check_positive("top_k", top_k)
    _checks.check_size(
        "sort.inverse_order", sort.inverse_order, 0, x.shape[0] * top_k, "T of x times top_k"
    )
    _checks.check_device("sort", sort.inverse_order, "x", x)
    return _backends.call("permute", x.contiguous(), sort.inverse_order, sort.expert_offsets, top_k)


def _fake(x, inverse_order, expert_offsets, top_k):
    return x.new_empty((inverse_order.shape[0], x.shape[1]))


def _triton(x, inverse_order, expert_offsets, top_k):
    from unimoe_kernels.ops.permute import kernel

    return kernel.permute(x, inverse_order, expert_offsets, top_k)


def _setup_context(ctx, inputs, output):
    _, inverse_order, expert_offsets, top_k = inputs
    ctx.save_for_backward(inverse_order, expert_offsets)
    ctx.top_k = top_k


def _backward(backend, ctx, grad):
    inverse_order, expert_offsets = ctx.saved_tensors
    grad_x = _backends.run(
        backend, "unpermute", grad.contiguous(), inverse_order, expert_offsets, None, ctx.top_k
    )
    return grad_x, None, None, None


_backends.declare(
    "permute",
    "(Tensor x, Tensor inverse_order, Tensor expert_offsets, int top_k) -> Tensor",
    reference=reference.permute,
    triton=_triton,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
