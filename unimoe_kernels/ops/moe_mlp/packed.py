"""Inference on a CPU: one operator, with weights packed once rather than in every call."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from unimoe_kernels import _backends, _extension

PACKABLE = (torch.float32, torch.bfloat16, torch.float16)

_backends.declare_compiled("pack_weight", "(Tensor weight, int sides) -> Tensor")
_backends.declare_compiled(
    "moe_mlp_inference",
    "(Tensor x, Tensor gate_up_proj, Tensor down_proj, Tensor? packed_gate_up, "
    "Tensor? packed_down, Tensor ids, Tensor scores, Tensor? gate_up_bias, Tensor? down_bias, "
    "str activation, float limit, float alpha) -> Tensor",
    fake=lambda x, *_: x.new_empty(x.shape),
)
_infer = torch.ops.unimoe.moe_mlp_inference.default


def infer(*arguments: object) -> Tensor:
    """Calls `moe_mlp` without saving anything for a backward, with packed weights if available."""
    with torch._C._AutoDispatchBelowAutograd():
        return _infer(*arguments)


class _Packed(NamedTuple):
    """A weight's panels, and the state of the weight when they were packed."""

    weight: weakref.ref[Tensor]
    state: tuple
    panels: Tensor


# Keyed by the identity of the weight, because tensors compare elementwise.
_packed: dict[int, _Packed] = {}


def pack_expert_weight(weight: Tensor, sides: int) -> int:
    """Stores a copy of a stacked weight in the order that matmuls read, for `panels_of`.

    Args:
        weight: `[E, out, in]` on the CPU, float32, bfloat16 or float16.
        sides: 2 for a `gate_up_proj`, whose two halves are read side by side, 1 for a `down_proj`.

    Returns:
        Size of the copy in bytes.

    Raises:
        RuntimeError: If the C++ extension is not compiled.
    """
    if not _extension.loaded:
        raise RuntimeError(f"pack_weights requires the C++ extension: {_extension.error}")
    return _pack(weight, sides).nbytes


def forget_expert_weight(weight: Tensor) -> None:
    """Frees the copy of a weight, if there is one."""
    _packed.pop(id(weight), None)


def panels_of(gate_up_proj: Tensor, down_proj: Tensor) -> tuple[Tensor, Tensor] | None:
    """Returns up-to-date panels of both weights, or None if they are not packed."""
    if not _packed:
        return None
    weights = (gate_up_proj, down_proj)
    if not all(id(weight) in _packed for weight in weights):
        return None
    if not all(weight.is_cpu and weight.dtype in PACKABLE for weight in weights):
        # The weights have been converted since, and will not be packed again.
        for weight in weights:
            forget_expert_weight(weight)
        return None
    return _current(gate_up_proj, 2), _current(down_proj, 1)


def _current(weight: Tensor, sides: int) -> Tensor:
    packed = _packed[id(weight)]
    return packed.panels if packed.state == _state(weight) else _pack(weight, sides)


def _pack(weight: Tensor, sides: int) -> Tensor:
    key = id(weight)
    _packed.pop(key, None)
    panels = torch.ops.unimoe.pack_weight(weight.detach(), sides)
    reference = weakref.ref(weight, lambda _: _packed.pop(key, None))
    _packed[key] = _Packed(reference, _state(weight), panels)
    return panels


def _state(weight: Tensor) -> tuple:
    version = 0 if weight.is_inference() else weight._version
    return version, weight.data_ptr(), weight.dtype, weight.device, weight.shape, weight.stride()
