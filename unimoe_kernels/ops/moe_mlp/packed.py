"""Weights of experts packed once for the CPU, instead of in every call."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unimoe_kernels import _backends, _checks, _extension

_PACKABLE = (torch.float32, torch.bfloat16, torch.float16)

_backends.declare_compiled("pack_weight", "(Tensor weight, int sides) -> Tensor")
_backends.declare_compiled(
    "moe_mlp_packed",
    "(Tensor x, Tensor gate_up_proj, Tensor down_proj, Tensor packed_gate_up, Tensor packed_down, "
    "Tensor ids, Tensor scores, Tensor? gate_up_bias, Tensor? down_bias, str activation, "
    "float limit, float alpha) -> Tensor",
)


class _Packed(NamedTuple):
    """A weight's panels, and what the weight was when they were made."""

    weight: weakref.ref[Tensor]
    state: tuple
    panels: Tensor


# By identity of the weight: tensors compare by their numbers.
_packed: dict[int, _Packed] = {}


def pack_weights(module: nn.Module) -> int:
    """Keeps a second copy of all experts' weights on the CPU, in the order that matmuls read.

    Without it every call packs the weights that it uses, which costs the more the fewer rows an
    expert gets: about 20 % at 64 rows, 7 % at 256 and 1 to 3 % at 1024 (AVX-512). Calls of up to 8
    rows an expert read the weights themselves. Answers stay the same, to the last bit.

    The copies serve calls without gradients that are not compiled by `torch.compile`, in `MoE`,
    `GroupedExperts` and the experts of transformers alike. The weights themselves are left as they
    are. A weight that has changed is packed anew in the next such call. Only changes that torch
    does not count, as through `.data` or under `torch.inference_mode`, need another call of this
    function. A copy is given up together with its weight.

    Args:
        module: a module, itself or parts of it with `gate_up_proj` `[E, 2F, D]` and `down_proj`
            `[E, D, F]`, float32, bfloat16 or float16.

    Returns:
        Bytes of the copies: those of the weights, twice those of 16-bit weights where the CPU does
        not multiply bfloat16 or the weights are float16; panels that are not full come on top.

    Raises:
        ValueError: if there are no such weights in module, or they are on another device or sharded
            between ranks.
        TypeError: if they have another dtype.
        RuntimeError: if the C++ extension is not compiled.
    """
    weights = _weights_of(module)
    if not weights:
        raise ValueError(
            f"module ({type(module).__name__}) must have experts with gate_up_proj [E, 2F, D] and "
            "down_proj [E, D, F]"
        )
    for name, weight, _ in weights:
        _checks.refuse_sharded(name, weight)
        if weight.device.type != "cpu":
            raise ValueError(f"{name} (on {weight.device}) must be on the CPU")
        if weight.dtype not in _PACKABLE:
            raise TypeError(f"{name} ({weight.dtype}) must be float32, bfloat16 or float16")
    if not _extension.loaded:
        raise RuntimeError(f"pack_weights needs the C++ extension: {_extension.error}")
    return sum(_pack(weight, sides).nbytes for _, weight, sides in weights)


def unpack_weights(module: nn.Module) -> None:
    """Gives up the copies that `pack_weights` made of the weights in `module`, if there are any."""
    for _, weight, _ in _weights_of(module):
        _packed.pop(id(weight), None)


def panels_of(gate_up_proj: Tensor, down_proj: Tensor) -> tuple[Tensor, Tensor] | None:
    """Returns the panels of both weights as they are now, or None where they are not packed."""
    weights = (gate_up_proj, down_proj)
    if not all(id(weight) in _packed for weight in weights):
        return None
    if not all(weight.is_cpu and weight.dtype in _PACKABLE for weight in weights):
        # They have been converted since, and will not be packed again.
        for weight in weights:
            _packed.pop(id(weight), None)
        return None
    return _current(gate_up_proj, 2), _current(down_proj, 1)


def _weights_of(module: nn.Module) -> list[tuple[str, Tensor, int]]:
    """Name, weight and sides of all experts' projections."""
    found = []
    for path, part in module.named_modules():
        first, last = getattr(part, "gate_up_proj", None), getattr(part, "down_proj", None)
        if not (isinstance(first, Tensor) and isinstance(last, Tensor)):
            continue
        if first.dim() == 3 and last.dim() == 3 and first.shape[1] == 2 * last.shape[2]:
            prefix = f"{path}." if path else ""
            found += [(f"{prefix}gate_up_proj", first, 2), (f"{prefix}down_proj", last, 1)]
    return found


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
