"""`grouped_mm`: one matmul per expert over a ragged batch of rows."""

from __future__ import annotations

from torch import Tensor

from unimoe_kernels import _backends, _checks
from unimoe_kernels.ops import cuda_matmul
from unimoe_kernels.ops.grouped_mm import compiled, plain, reference


def grouped_mm(
    x: Tensor, weight: Tensor, expert_offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Multiplies each group of rows by the weight of its expert.

    `y[i] = weight[e] @ x[i] + bias[e]`, where e is the expert that owns row i.
    Expert `e` owns rows `expert_offsets[e]` to `expert_offsets[e + 1] - 1`. Groups may have any
    size, including 0; output rows from `expert_offsets[E]` on are zero.

    Example:
        >>> x, weight = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[[10.0]], [[100.0]]])
        >>> grouped_mm(x, weight, torch.tensor([0, 1, 2], dtype=torch.int32)).flatten().tolist()
        [10.0, 200.0, 0.0]

    Args:
        x: `[N, D]` in expert order, float16, bfloat16, float32 or float64, any strides.
        weight: `[E, F, D]`, dtype and device of `x`.
        expert_offsets: `[E + 1]`, int32, non-decreasing from 0, as returned by `expert_sort`.
        bias: `[E, F]` or None.

    Returns:
        `[N, F]`, dtype of `x` (under `torch.autocast` that of torch's matmuls), contiguous.

    Raises:
        ValueError: If shapes do not match or devices differ.
        TypeError: If dtypes differ or are not among those above.

    Note:
        Differentiable in `x`, `weight` and `bias`; deterministic. Products are summed in float32
        (float64 for float64).
    """
    x, weight, bias = _checks.autocast(x, weight, bias)
    _checks.check_tensor("x", x, "[N, D]")
    check_grouped_weight("weight", weight, "x", x, expert_offsets)
    if bias is not None:
        _checks.check_tensor("bias", bias, "[E, F]")
        _checks.check_size("bias", bias, 0, weight.shape[0], "E of weight")
        _checks.check_size("bias", bias, 1, weight.shape[1], "F of weight")
        _checks.check_same("bias", bias, "x", x)
    return _backends.call("grouped_mm", x.contiguous(), weight, expert_offsets, bias)


def check_grouped_weight(
    name: str, weight: Tensor, x_name: str, x: Tensor, expert_offsets: Tensor
) -> None:
    """Checks a stack of weights `[E, F, D]` against rows `[N, D]` and offsets `[E + 1]`."""
    _checks.check_tensor(name, weight, "[E, F, D]")
    _checks.check_size(name, weight, 2, x.shape[1], f"D of {x_name}")
    _checks.check_same(name, weight, x_name, x)
    _checks.check_tensor("expert_offsets", expert_offsets, "[E + 1]", (_checks.INTEGERS[0],))
    _checks.check_size(
        "expert_offsets", expert_offsets, 0, weight.shape[0] + 1, f"E of {name} plus 1"
    )
    _checks.check_device("expert_offsets", expert_offsets, x_name, x)


def _fake(x, weight, expert_offsets, bias):
    return x.new_empty((x.shape[0], weight.shape[1]))


def _triton(x, weight, expert_offsets, bias):
    from unimoe_kernels.ops.grouped_mm import kernel

    return kernel.grouped_mm(x, weight, expert_offsets, bias)


def _setup_context(ctx, inputs, output):
    x, weight, expert_offsets, _ = inputs
    ctx.save_for_backward(
        x if ctx.needs_input_grad[1] else None,
        weight if ctx.needs_input_grad[0] else None,
        expert_offsets,
    )


def _backward(backend, ctx, grad):
    x, weight, expert_offsets = ctx.saved_tensors
    needs_x, needs_weight, _, needs_bias = ctx.needs_input_grad
    grad = grad.contiguous()
    grad_x = grad_weight = grad_bias = None
    if needs_x:
        weight = weight.transpose(1, 2)
        grad_x = _backends.run(backend, "grouped_mm", grad, weight, expert_offsets, None)
    if needs_weight or needs_bias:
        # With a frozen weight only the bias gradient is required: pass rows without columns.
        x = grad.new_empty((grad.shape[0], 0)) if x is None else x
        grad_weight, grad_bias = _backends.run(
            backend, "grouped_mm_wgrad", grad, x, expert_offsets, needs_bias
        )
    return (
        grad_x,
        grad_weight if needs_weight else None,
        None,
        grad_bias if needs_bias else None,
    )


def _wgrad_fake(grad, x, expert_offsets, has_bias):
    num_experts = expert_offsets.shape[0] - 1
    return (
        x.new_empty((num_experts, grad.shape[1], x.shape[1])),
        x.new_empty((num_experts if has_bias else 0, grad.shape[1])),
    )


def _wgrad_triton(grad, x, expert_offsets, has_bias):
    from unimoe_kernels.ops.grouped_mm import kernel

    return kernel.grouped_mm_wgrad(grad, x, expert_offsets, has_bias)


def _wgrad_setup_context(ctx, inputs, output):
    grad, x, expert_offsets, ctx.has_bias = inputs
    ctx.save_for_backward(grad, x, expert_offsets)


def _wgrad_backward(backend, ctx, grad_weight, grad_bias):
    grad, x, expert_offsets = ctx.saved_tensors
    needs_grad, needs_x, _, _ = ctx.needs_input_grad
    grad_grad = grad_x = None
    if needs_grad:
        grad_bias = grad_bias if ctx.has_bias else None
        grad_grad = _backends.run(backend, "grouped_mm", x, grad_weight, expert_offsets, grad_bias)
    if needs_x:
        turned = grad_weight.transpose(1, 2)
        grad_x = _backends.run(backend, "grouped_mm", grad, turned, expert_offsets, None)
    return grad_grad, grad_x, None, None


_backends.declare(
    "grouped_mm_wgrad",
    "(Tensor grad, Tensor x, Tensor expert_offsets, bool has_bias) "
    "-> (Tensor grad_weight, Tensor grad_bias)",
    reference=reference.grouped_mm_wgrad,
    native=compiled.grouped_mm_wgrad,
    triton=_wgrad_triton,
    plain=plain.grouped_mm_wgrad,
    fake=_wgrad_fake,
    setup_context=_wgrad_setup_context,
    backward=_wgrad_backward,
    public=False,
    kernels=cuda_matmul.WEIGHT_GRADIENT,
    proven=cuda_matmul.PROVEN,
)
_backends.declare(
    "grouped_mm",
    "(Tensor x, Tensor weight, Tensor expert_offsets, Tensor? bias) -> Tensor",
    reference=reference.grouped_mm,
    native=compiled.grouped_mm,
    plain=plain.grouped_mm,
    triton=_triton,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    kernels=cuda_matmul.GROUPED_MM,
    proven=cuda_matmul.PROVEN,
)
