"""Specification of `swiglu` and its gradient."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor, activation: str, limit: float, alpha: float) -> Tensor:
    """Multiplies the activated gate half by the up half, in at least float32."""
    gate, up = _halves(gate_up)
    if activation == "swiglu_clamped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        out = gate * torch.sigmoid(alpha * gate) * (up + 1)
    else:
        out = _ACTIVATIONS[activation](gate) * up
    return out.to(gate_up.dtype).contiguous()


def swiglu_backward(
    grad: Tensor, gate_up: Tensor, activation: str, limit: float, alpha: float
) -> Tensor:
    """Returns the gradient of `swiglu` in `gate_up`."""
    gate, up = _halves(gate_up)
    grad = grad.to(gate.dtype)
    if activation == "swiglu_clamped":
        gate_open, up_open = gate <= limit, (up >= -limit) & (up <= limit)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        sigmoid = torch.sigmoid(alpha * gate)
        slope = sigmoid * (1 + alpha * gate * (1 - sigmoid))
        grad_gate = grad * (up + 1) * slope * gate_open
        grad_up = grad * gate * sigmoid * up_open
    else:
        grad_gate = _BACKWARDS[activation](grad * up, gate)
        grad_up = grad * _ACTIVATIONS[activation](gate)
    return torch.cat([grad_gate, grad_up], -1).to(gate_up.dtype)


def _halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    if gate_up.dtype in (torch.bfloat16, torch.float16):
        gate_up = gate_up.float()
    return gate_up.chunk(2, -1)


def _relu_backward(grad: Tensor, gate: Tensor) -> Tensor:
    return grad * (gate > 0)


def _gelu_backward(grad: Tensor, gate: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(gate * math.sqrt(0.5)))
    pdf = torch.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
    return grad * (cdf + gate * pdf)


def _gelu_tanh_backward(grad: Tensor, gate: Tensor) -> Tensor:
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    tanh = torch.tanh(scale * (gate + cubic * gate**3))
    inner = scale * (1 + 3 * cubic * gate * gate)
    return grad * 0.5 * (1 + tanh + gate * (1 - tanh * tanh) * inner)


def _gelu_tanh(gate: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh")


_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": _gelu_tanh, "relu": F.relu}
_BACKWARDS = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": _gelu_backward,
    "gelu_tanh": _gelu_tanh_backward,
    "relu": _relu_backward,
}
