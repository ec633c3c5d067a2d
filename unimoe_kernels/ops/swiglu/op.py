"""`swiglu`: the gated activation between the two projections of an expert."""

from __future__ import annotations

from torch import Tensor

from unimoe_kernels import _backends, _checks
from unimoe_kernels.ops.swiglu import plain, reference

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "swiglu_clamped")


def swiglu(
    gate_up: Tensor, activation: str = "silu", *, limit: float = 7.0, alpha: float = 1.702
) -> Tensor:
    """Multiplies the activated first half of each row by its second half.

    `out = act(gate_up[..., :F]) * gate_up[..., F:]`. `"swiglu_clamped"` is the gate of gpt-oss:
    `gate` is clamped to at most `limit`, `up` to `[-limit, limit]`, and
    `out = gate * sigmoid(alpha * gate) * (up + 1)`.

    Example:
        >>> swiglu(torch.tensor([[1.0, -1.0, 3.0, 5.0]]), "relu")
        tensor([[3., 0.]])

    Args:
        gate_up: `[N, 2F]`, gate first, float16, bfloat16, float32 or float64, any strides.
        activation: `"silu"`, `"gelu"` (exact), `"gelu_tanh"`, `"relu"` or `"swiglu_clamped"`.
        limit: Clamp of `"swiglu_clamped"`; ignored by the others.
        alpha: Slope of the sigmoid of `"swiglu_clamped"`; ignored by the others.

    Returns:
        `[N, F]`, dtype of `gate_up`, contiguous.

    Raises:
        ValueError: If `gate_up` is not 2-D or its last size is odd, or `activation` is unknown.
        TypeError: If `gate_up` has a dtype that is not listed above.

    Note:
        Differentiable in `gate_up`, deterministic. Computed in float32 (float64 for float64) and
        rounded once.

    Reference:
        arXiv:2002.05202 (gated units); arXiv:2508.10925 (gpt-oss).
    """
    _checks.check_tensor("gate_up", gate_up, "[N, 2F]")
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up (shape {tuple(gate_up.shape)}) must have an even last size")
    _checks.check_choice("activation", activation, ACTIVATIONS)
    return _backends.call("swiglu", gate_up.contiguous(), activation, limit, alpha)


def _fake(gate_up, activation, limit, alpha):
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


def _triton(gate_up, activation, limit, alpha):
    from unimoe_kernels.ops.swiglu import kernel

    return kernel.swiglu(gate_up, activation, limit, alpha)


def _setup_context(ctx, inputs, output):
    gate_up, ctx.activation, ctx.limit, ctx.alpha = inputs
    ctx.save_for_backward(gate_up)


def _backward(backend, ctx, grad):
    (gate_up,) = ctx.saved_tensors
    gate = (ctx.activation, ctx.limit, ctx.alpha)
    grad_gate_up = _backends.run(backend, "swiglu_backward", grad.contiguous(), gate_up, *gate)
    return grad_gate_up, None, None, None


def _backward_fake(grad, gate_up, activation, limit, alpha):
    return gate_up.new_empty(gate_up.shape)


def _backward_triton(grad, gate_up, activation, limit, alpha):
    from unimoe_kernels.ops.swiglu import kernel

    return kernel.swiglu_backward(grad, gate_up, activation, limit, alpha)


_backends.declare(
    "swiglu_backward",
    "(Tensor grad, Tensor gate_up, str activation, float limit, float alpha) -> Tensor",
    reference=reference.swiglu_backward,
    plain=plain.swiglu_backward,
    triton=_backward_triton,
    fake=_backward_fake,
    public=False,
)
_backends.declare(
    "swiglu",
    "(Tensor gate_up, str activation, float limit, float alpha) -> Tensor",
    reference=reference.swiglu,
    plain=plain.swiglu,
    triton=_triton,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
