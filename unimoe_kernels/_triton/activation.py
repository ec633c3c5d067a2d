"""The gated activations of `swiglu` and their gradients, on values in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """Returns `1 / (1 + exp(-x))` in the dtype of `x`; saturates at 0 and 1 without NaN."""
    return 1 / (1 + tl.exp(-x))


@triton.jit
def gate_and_slope(gate, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """Returns the activated gate and its derivative; for `"swiglu_clamped"` gate is clamped."""
    if ACTIVATION == "silu":
        share = sigmoid(gate)
        activated = gate * share
        slope = share * (1 + gate * (1 - share))
    elif ACTIVATION == "swiglu_clamped":
        share = sigmoid(ALPHA * gate)
        activated = gate * share
        slope = share * (1 + ALPHA * gate * (1 - share))
    elif ACTIVATION == "gelu":
        share = 0.5 * (1 + tl.erf(0.7071067811865476 * gate))
        activated = gate * share
        slope = share + gate * (0.3989422804014327 * tl.exp(-0.5 * gate * gate))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 is the sigmoid of 2z.
        share = sigmoid(1.5957691216057308 * gate * (1 + 0.044715 * gate * gate))
        activated = gate * share
        inner = 1.5957691216057308 * (1 + 0.134145 * gate * gate)
        slope = share + gate * (share * (1 - share)) * inner
    else:
        tl.static_assert(ACTIVATION == "relu", "unknown activation")
        activated = tl.where(gate < 0, 0, gate)
        slope = tl.where(gate <= 0, 0.0, 1.0).to(gate.dtype)
    return activated, slope


@triton.jit
def clamp(gate, up, LIMIT: tl.constexpr):
    """Returns the clamped gate and the clamped up plus 1; NaN is propagated."""
    gate = tl.where(gate > LIMIT, LIMIT, gate)
    up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return gate, up + 1


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """Returns `act(gate) * up`; for `"swiglu_clamped"` with both clamped, and 1 added to up."""
    if ACTIVATION == "swiglu_clamped":
        gate, up = clamp(gate, up, LIMIT)
    activated, _ = gate_and_slope(gate, ACTIVATION, ALPHA)
    return activated * up


@triton.jit
def activate_backward(
    grad, gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr
):
    """Returns the gradients of `activate` with respect to gate and up."""
    if ACTIVATION == "swiglu_clamped":
        gate_open = gate <= LIMIT
        up_open = (up >= -LIMIT) & (up <= LIMIT)
        gate, up = clamp(gate, up, LIMIT)
        activated, slope = gate_and_slope(gate, ACTIVATION, ALPHA)
        return tl.where(gate_open, grad * up * slope, 0), tl.where(up_open, grad * activated, 0)
    elif ACTIVATION == "relu":
        # Selected rather than multiplied, as in torch: infinity times a zero slope would be NaN,
        # and a NaN gate must propagate.
        activated, _ = gate_and_slope(gate, ACTIVATION, ALPHA)
        return tl.where(gate <= 0, 0, grad * up), grad * activated
    else:
        activated, slope = gate_and_slope(gate, ACTIVATION, ALPHA)
        return grad * up * slope, grad * activated


def gate_constants(gate: tuple[str, float, float]) -> dict[str, object]:
    """Returns the constants of a kernel for an activation with its limit and alpha."""
    activation, limit, alpha = gate
    clamped = activation == "swiglu_clamped"
    # Other activations ignore both; fixed values avoid compiling them again.
    return {
        "ACTIVATION": activation,
        "LIMIT": limit if clamped else 0.0,
        "ALPHA": alpha if clamped else 0.0,
    }
