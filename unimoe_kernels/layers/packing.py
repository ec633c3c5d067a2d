"""Weights of experts packed once for the CPU, instead of in every call."""

from __future__ import annotations

from torch import Tensor, nn

from unimoe_kernels import _checks
from unimoe_kernels.ops import PACKABLE, forget_expert_weight, pack_expert_weight


def pack_weights(module: nn.Module) -> int:
    """Keeps a second copy of all experts' weights on the CPU, in the order that matmuls read.

    Without it every call packs the weights that it uses, which costs the more the fewer rows an
    expert gets: about 20 % at 64 rows, 7 % at 256 and 1 to 3 % at 1024 (AVX-512). Calls of up to 8
    rows an expert read the weights themselves. The outputs stay the same, to the last bit.

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
        ValueError: If there are no such weights in module, or they are on another device or sharded
            between ranks.
        TypeError: If they have another dtype.
        RuntimeError: If the C++ extension is not compiled.
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
        if weight.dtype not in PACKABLE:
            raise TypeError(f"{name} ({weight.dtype}) must be float32, bfloat16 or float16")
    return sum(pack_expert_weight(weight, sides) for _, weight, sides in weights)


def unpack_weights(module: nn.Module) -> None:
    """Gives up the copies that `pack_weights` made of the weights in `module`, if there are any."""
    for _, weight, _ in _weights_of(module):
        forget_expert_weight(weight)


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
