"""Conversion between stacked expert weights and separate FFNs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from unimoe_kernels import _checks

FFN_KEYS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def stack_experts(ffns: Sequence[nn.Module | Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stacks the weights of dense SwiGLU blocks in the layout of `GroupedExperts`, bit for bit.

    Args:
        ffns: one per expert, in order: modules, or their state dicts, with exactly the keys
            `gate_proj.weight` `[F, D]`, `up_proj.weight` `[F, D]`, `down_proj.weight` `[D, F]`, all
            of one shape, dtype and device.

    Returns:
        `gate_up_proj` `[E, 2F, D]`, gate rows first, and `down_proj` `[E, D, F]`, in new memory.

    Raises:
        ValueError: If ffns is empty, keys are missing or unexpected, shapes, dtypes or devices
            differ, or weights are sharded between ranks.
    """
    weights = ffn_weights(ffns)
    with torch.no_grad():
        gate_up_proj = torch.stack([torch.cat((gate_FD, up_FD)) for gate_FD, up_FD, _ in weights])
        return gate_up_proj, torch.stack([down_DF for _, _, down_DF in weights])


def unstack_experts(gate_up_proj: Tensor, down_proj: Tensor) -> list[dict[str, Tensor]]:
    """Splits stacked weights into state dicts, bit for bit; the inverse of `stack_experts`.

    Args:
        gate_up_proj: `[E, 2F, D]`, gate rows first.
        down_proj: `[E, D, F]`.

    Returns:
        The state dict of each expert's FFN, with the keys that `stack_experts` requires, as views.

    Raises:
        ValueError: If shapes do not match, or weights are sharded between ranks.
    """
    _checks.refuse_sharded("gate_up_proj", gate_up_proj)
    _checks.refuse_sharded("down_proj", down_proj)
    if gate_up_proj.dim() != 3 or gate_up_proj.shape[1] % 2:
        raise ValueError(f"gate_up_proj (shape {tuple(gate_up_proj.shape)}) must be [E, 2F, D]")
    num_experts, double_size, hidden_size = gate_up_proj.shape
    expected = (num_experts, hidden_size, double_size // 2)
    if down_proj.shape != expected:
        raise ValueError(f"down_proj (shape {tuple(down_proj.shape)}) must be {expected}")
    return [
        dict(zip(FFN_KEYS, (*gate_up_GD.detach().chunk(2), down_DF.detach()), strict=True))
        for gate_up_GD, down_DF in zip(gate_up_proj, down_proj, strict=True)
    ]


def ffn_weights(
    ffns: Sequence[nn.Module | Mapping[str, Tensor]],
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Returns gate, up and down weight of each FFN; raises ValueError like `stack_experts`."""
    weights = [_weights_of(ffn, index) for index, ffn in enumerate(ffns)]
    if not weights:
        raise ValueError("ffns is empty, it must contain one FFN per expert")
    gate_FD = weights[0][0]
    if gate_FD.dim() != 2:
        raise ValueError(f"ffns[0] {FFN_KEYS[0]} is {tuple(gate_FD.shape)}, it must be [F, D]")
    like = (gate_FD.dtype, gate_FD.device)
    expected = [gate_FD.shape, gate_FD.shape, gate_FD.shape[::-1]]
    for index, own in enumerate(weights):
        for key, weight, shape in zip(FFN_KEYS, own, expected, strict=True):
            _checks.refuse_sharded(f"ffns[{index}] {key}", weight)
            if weight.shape != shape or (weight.dtype, weight.device) != like:
                raise ValueError(
                    f"ffns[{index}] {key} is {tuple(weight.shape)} {weight.dtype} on "
                    f"{weight.device}, it must be {tuple(shape)} {like[0]} on {like[1]}"
                )
    return weights


def _weights_of(ffn: nn.Module | Mapping[str, Tensor], index: int) -> tuple[Tensor, Tensor, Tensor]:
    state = ffn.state_dict() if isinstance(ffn, nn.Module) else ffn
    if set(state) != set(FFN_KEYS):
        raise ValueError(f"ffns[{index}] has the keys {sorted(state)}, it must have {FFN_KEYS}")
    gate_FD, up_FD, down_DF = (state[key] for key in FFN_KEYS)
    return gate_FD, up_FD, down_DF
