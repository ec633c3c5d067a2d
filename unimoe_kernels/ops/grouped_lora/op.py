"""`grouped_lora`: low-rank updates of expert weights, without materialising them."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from unimoe_kernels import _backends, _checks
from unimoe_kernels.ops.grouped_lora import composition
from unimoe_kernels.ops.grouped_mm.op import check_grouped_weight


def grouped_lora(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, expert_offsets: Tensor, scale: float = 1.0
) -> Tensor:
    """Applies each expert's low-rank update to its rows: `y[i] = scale * B[e] @ (A[e] @ x[i])`.

    Example:
        >>> x, weight = torch.ones(3, 4), torch.ones(2, 5, 4)
        >>> lora_A, lora_B, scale = torch.ones(2, 1, 4), torch.ones(2, 5, 1), 0.5
        >>> offsets = torch.tensor([0, 1, 3], dtype=torch.int32)
        >>> y = grouped_mm(x, weight, offsets) + grouped_lora(x, lora_A, lora_B, offsets, scale)
        >>> torch.allclose(y, grouped_mm(x, weight + scale * lora_B @ lora_A, offsets))
        True

    Args:
        x: `[N, D]` in expert order, float16, bfloat16, float32 or float64, any strides.
        lora_A: `[E, r, D]`, dtype and device of `x`.
        lora_B: `[E, F, r]`, dtype and device of `x`.
        expert_offsets: `[E + 1]`, int32, as returned by `expert_sort`.
        scale: Factor of the update.

    Returns:
        `[N, F]`, dtype of `x` (under `torch.autocast` that of torch's matmuls), contiguous; zeros
        from row `expert_offsets[E]` on.

    Raises:
        ValueError: If shapes do not match or devices differ.
        TypeError: If dtypes differ or are not among those above.

    Note:
        Differentiable in `x`, `lora_A` and `lora_B`; deterministic. Saves `x` and the `[N, r]`
        products for the backward.

    Reference:
        arXiv:2106.09685.
    """
    x, lora_A, lora_B = _checks.autocast(x, lora_A, lora_B)
    _checks.check_tensor("x", x, "[N, D]")
    check_grouped_weight("lora_A", lora_A, "x", x, expert_offsets)
    _checks.check_tensor("lora_B", lora_B, "[E, F, r]")
    _checks.check_size("lora_B", lora_B, 0, lora_A.shape[0], "E of lora_A")
    _checks.check_size("lora_B", lora_B, 2, lora_A.shape[1], "r of lora_A")
    _checks.check_same("lora_B", lora_B, "x", x)
    x = x.contiguous()
    return _backends.call("grouped_lora", x, lora_A, lora_B, expert_offsets, scale)[0]


def _fake(x, lora_A, lora_B, expert_offsets, scale):
    return (
        x.new_empty((x.shape[0], lora_B.shape[1])),
        x.new_empty((x.shape[0], lora_A.shape[1])),
    )


def _setup_context(ctx, inputs, output):
    x, lora_A, lora_B, expert_offsets, ctx.scale = inputs
    low = output[1]
    ctx.mark_non_differentiable(low)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, lora_A, lora_B, low, expert_offsets)


def _backward(backend, ctx, grad, *_):
    if grad is None:
        return (None,) * 5
    x, lora_A, lora_B, low, expert_offsets = ctx.saved_tensors
    backward = partial(_backends.run, backend, "grouped_lora_backward")
    if _backends.is_recorded(grad, x, lora_A, lora_B):
        # The saved products are not connected to x and A in the graph: recompute them.
        low = _backends.run(backend, "grouped_mm", x, lora_A, expert_offsets, None)
        backward = partial(composition.backward, backend)
    saved = (x, lora_A, lora_B, low, expert_offsets)
    grad_x, grad_A, grad_B = backward(grad.contiguous(), *saved, ctx.scale, ctx.needs_input_grad[0])
    return grad_x if ctx.needs_input_grad[0] else None, grad_A, grad_B, None, None


def _backward_fake(grad, x, lora_A, lora_B, low, expert_offsets, scale, needs_x):
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        x.new_empty(lora_A.shape),
        x.new_empty(lora_B.shape),
    )


def _triton(x, lora_A, lora_B, expert_offsets, scale):
    from unimoe_kernels.ops.grouped_lora import kernel

    if not kernel.covers(x, lora_A, lora_B):
        return composition.forward("triton", x, lora_A, lora_B, expert_offsets, scale)
    return kernel.grouped_lora(x, lora_A, lora_B, expert_offsets, scale)


def _backward_triton(grad, x, lora_A, lora_B, low, expert_offsets, scale, needs_x):
    from unimoe_kernels.ops.grouped_lora import kernel, kernel_backward

    if not kernel.covers(x, lora_A, lora_B):
        saved = (x, lora_A, lora_B, low, expert_offsets)
        return composition.backward("triton", grad, *saved, scale, needs_x)
    turned = (lora_B.transpose(1, 2), lora_A.transpose(1, 2))
    grad_x, grad_low = kernel.grouped_lora(grad, *turned, expert_offsets, scale, needs_x)
    wgrad = kernel_backward.grouped_lora_wgrad
    return grad_x, *wgrad(grad, x, grad_low, low, expert_offsets, scale)


_backends.declare(
    "grouped_lora_backward",
    "(Tensor grad, Tensor x, Tensor lora_A, Tensor lora_B, Tensor low, Tensor expert_offsets, "
    "float scale, bool needs_x) -> (Tensor grad_x, Tensor grad_A, Tensor grad_B)",
    reference=partial(composition.backward, "reference"),
    native=partial(composition.backward, "default"),
    triton=_backward_triton,
    parts=composition.PARTS,
    fused=True,
    fake=_backward_fake,
    public=False,
)
_backends.declare(
    "grouped_lora",
    "(Tensor x, Tensor lora_A, Tensor lora_B, Tensor expert_offsets, float scale) "
    "-> (Tensor y, Tensor low)",
    reference=partial(composition.forward, "reference"),
    native=partial(composition.forward, "default"),
    triton=_triton,
    parts=composition.PARTS,
    fused=True,
    fake=_fake,
    setup_context=_setup_context,
    num_outputs=1,
    backward=_backward,
)
