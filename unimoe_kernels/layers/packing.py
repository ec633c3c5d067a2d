"""Packing of expert weights for the CPU, once rather than in every call."""

from __future__ import annotations

from torch import Tensor, nn

from unimoe_kernels import _checks
from unimoe_kernels.ops import PACKABLE, forget_expert_weight, pack_expert_weight


def pack_weights(module: nn.Module) -> int:
    """Stores a second copy of all expert weights on the CPU, in the order that matmuls read.

    Otherwise every call packs the weights that it uses. The overhead is larger with fewer rows per
    expert: about 20 % at 64 rows, 7 % at 256 and 1 to 3 % at 1024 (AVX-512). Calls with up to 8
    rows per expert read the unpacked weights. Outputs are bit-identical.

    The copies are used by calls without gradients that are not compiled by `torch.compile`, in
    `MoE`, `GroupedExperts` and the experts of transformers. The weights are not changed. A weight
    that was modified is packed again in the next such call; only modifications that torch does not
    track, such as through `.data` or under `torch.inference_mode`, require calling this function
    again. A copy is freed together with its weight.

    Args:
        module: a module that has, or whose submodules have, `gate_up_proj` `[E, 2F, D]` and
            `down_proj` `[E, D, F]`, float32, bfloat16 or float16.

    Returns:
        Size of the copies in bytes: that of the weights, or twice that for float16 and, on CPUs
        without bfloat16 instructions, bfloat16; plus the padding of panels that are not full.

    Raises:
        ValueError: If module has no such weights, or they are on another device or sharded between
            ranks.
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
    """Frees the copies that `pack_weights` made of the weights in `module`, if there are any."""
    for _, weight, _ in _weights_of(module):
        forget_expert_weight(weight)


def _weights_of(module: nn.Module) -> list[tuple[str, Tensor, int]]:
    """Returns name, weight and sides of the projections of all experts."""
    found = []
    for path, part in module.named_modules():
        first, last = getattr(part, "gate_up_proj", None), getattr(part, "down_proj", None)
        if not (isinstance(first, Tensor) and isinstance(last, Tensor)):
            continue
        if first.dim() == 3 and last.dim() == 3 and first.shape[1] == 2 * last.shape[2]:
            prefix = f"{path}." if path else ""
            found += [(f"{prefix}gate_up_proj", first, 2), (f"{prefix}down_proj", last, 1)]
    return found
