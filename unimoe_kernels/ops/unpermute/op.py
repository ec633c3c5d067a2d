"""`unpermute`: the score-weighted sum of the rows of each token."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from unimoe_kernels import _backends, _checks
from unimoe_kernels.ops.expert_sort.op import ExpertSort
from unimoe_kernels.ops.unpermute import plain, reference


def unpermute(rows: Tensor, sort: ExpertSort, top_k: int, scores: Tensor | None = None) -> Tensor:
    """Sums the K expert rows of each token, weighted by score.

    `y[t] = sum_k scores[t, k] * rows[sort.inverse_order[t * K + k]]`.

    Example:
        >>> rows = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0], [32.0]])
        >>> sort = expert_sort(torch.tensor([[0, 2], [2, 1], [0, 1]]), 3)
        >>> unpermute(rows, sort, top_k=2).flatten().tolist()  # rows 0 + 4, 5 + 2, 1 + 3
        [17.0, 36.0, 10.0]

    Args:
        rows: `[N, D]` in expert order, float16, bfloat16, float32 or float64, any strides.
        sort: Result of `expert_sort` on ids `[T, K]` with `N = T * K`, same device as `rows`.
        top_k: Number of experts per token K.
        scores: `[T, K]`, any floating dtype, used in float32 (float64 for float64 rows). None
            weights every row by 1.

    Returns:
        `[T, D]`, dtype of `rows`, contiguous. Rows of another rank's experts are never read and add
        exactly 0.

    Raises:
        ValueError: If `rows` is not 2-D, `top_k` is less than 1, or `sort` or `scores` does not
            match the shape of `rows` or is on another device.
        TypeError: If a dtype is not one of those above.

    Note:
        Differentiable in `rows` and `scores`. Sums run in choice order in float32 (float64 for
        float64); forward and backward are deterministic.
    """
    _checks.check_tensor("rows", rows, "[N, D]")
    _checks.check_positive("top_k", top_k)
    order_N = sort.inverse_order
    _checks.check_size("rows", rows, 0, order_N.shape[0], "the rows of sort")
    _checks.check_device("sort", order_N, "rows", rows)
    if order_N.shape[0] % top_k:
        raise ValueError(f"top_k ({top_k}) must divide the number of rows ({order_N.shape[0]})")
    if scores is not None:
        _checks.check_tensor("scores", scores, "[T, K]")
        _checks.check_size("scores", scores, 0, order_N.shape[0] // top_k, "rows over top_k")
        _checks.check_size("scores", scores, 1, top_k, "top_k")
        _checks.check_device("scores", scores, "rows", rows)
        scores = scores.to(_checks.accumulation_dtype(rows.dtype)).contiguous()
    return _backends.call(
        "unpermute", rows.contiguous(), order_N, sort.expert_offsets, scores, top_k
    )


def _fake(rows, inverse_order, expert_offsets, scores, top_k):
    return rows.new_empty((inverse_order.shape[0] // top_k, rows.shape[1]))


def _triton(rows, inverse_order, expert_offsets, scores, top_k):
    from unimoe_kernels.ops.unpermute import kernel

    return kernel.unpermute(rows, inverse_order, expert_offsets, scores, top_k)


def _setup_context(ctx, inputs, output):
    rows, inverse_order, expert_offsets, scores, top_k = inputs
    # Without scores, the gradient is a copy of rows of grad and does not depend on rows.
    rows = None if scores is None else rows
    ctx.save_for_backward(rows, inverse_order, expert_offsets, scores)
    ctx.top_k = top_k


def _backward(backend, ctx, grad):
    rows, inverse_order, expert_offsets, scores = ctx.saved_tensors
    grad = grad.contiguous()
    if scores is not None:
        grad_rows, grad_scores = _backends.run(
            backend,
            "unpermute_backward",
            grad,
            rows,
            inverse_order,
            expert_offsets,
            scores,
            ctx.top_k,
        )
        return grad_rows, None, None, grad_scores, None
    grad_rows = _backends.run(backend, "permute", grad, inverse_order, expert_offsets, ctx.top_k)
    return grad_rows, None, None, None, None


def _backward_fake(grad, rows, inverse_order, expert_offsets, scores, top_k):
    return rows.new_empty(rows.shape), scores.new_empty(scores.shape)


def _backward_triton(grad, rows, inverse_order, expert_offsets, scores, top_k):
    from unimoe_kernels.ops.unpermute import kernel

    return kernel.unpermute_backward(grad, rows, inverse_order, expert_offsets, scores, top_k)


def _backward_setup_context(ctx, inputs, output):
    *tensors, ctx.top_k = inputs
    ctx.save_for_backward(*tensors)


def _backward_backward(backend, ctx, grad_grad_rows, grad_grad_scores):
    grad, rows, inverse_order, expert_offsets, scores = ctx.saved_tensors
    sort = (inverse_order, expert_offsets)
    grad_grad_rows = grad_grad_rows.contiguous()
    grad_grad_scores = grad_grad_scores.contiguous()
    # Both results are bilinear: each is a product of two of grad, rows and scores.
    unpermute_ = partial(_backends.run, backend, "unpermute")
    grad_grad = unpermute_(grad_grad_rows, *sort, scores, ctx.top_k)
    grad_grad = grad_grad + unpermute_(rows, *sort, grad_grad_scores, ctx.top_k)
    grad_rows, grad_scores = _backends.run(
        backend, "unpermute_backward", grad, grad_grad_rows, *sort, grad_grad_scores, ctx.top_k
    )
    return grad_grad, grad_rows, None, None, grad_scores, None


_backends.declare(
    "unpermute_backward",
    "(Tensor grad, Tensor rows, Tensor inverse_order, Tensor expert_offsets, Tensor scores, "
    "int top_k) -> (Tensor grad_rows, Tensor grad_scores)",
    reference=reference.unpermute_backward,
    triton=_backward_triton,
    plain=plain.unpermute_backward,
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
    public=False,
)
_backends.declare(
    "unpermute",
    "(Tensor rows, Tensor inverse_order, Tensor expert_offsets, Tensor? scores, int top_k) "
    "-> Tensor",
    reference=reference.unpermute,
    triton=_triton,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
