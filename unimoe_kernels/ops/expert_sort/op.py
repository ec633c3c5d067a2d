"""`expert_sort`: the order of routed rows grouped by expert."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unimoe_kernels import _backends, _checks
from unimoe_kernels.ops.expert_sort import plain, reference


class ExpertSort(NamedTuple):
    """Output of `expert_sort`: the order of routed rows, as int32 tensors.

    Routed row `n` is choice `n % K` of token `n // K`.

    Attributes:
        row_order: `[N]`, the routed row at each sorted position.
        inverse_order: `[N]`, the sorted position of each routed row.
        tokens_per_expert: `[E]`, number of rows of each expert.
        expert_offsets: `[E + 1]`, expert `e` owns sorted positions
            `expert_offsets[e]` to `expert_offsets[e + 1] - 1`; the last value is the number of rows
            that belong to any of the E experts.
    """

    row_order: Tensor
    inverse_order: Tensor
    tokens_per_expert: Tensor
    expert_offsets: Tensor


def expert_sort(ids: Tensor, num_experts: int) -> ExpertSort:
    """Groups routed rows by expert, keeping their order within an expert.

    Example:
        >>> # three tokens, two choices each, three experts
        >>> sort = expert_sort(torch.tensor([[0, 2], [2, 1], [0, 1]]), 3)
        >>> sort.row_order.tolist(), sort.inverse_order.tolist()
        ([0, 4, 3, 5, 1, 2], [0, 4, 5, 2, 1, 3])
        >>> sort.tokens_per_expert.tolist(), sort.expert_offsets.tolist()
        ([2, 2, 2], [0, 2, 4, 6])

    Args:
        ids: `[T, K]` or `[N]`, int32 or int64, any strides. A row with a value of `num_experts` or
            more is dropped because it belongs to another rank or to no expert: it is sorted to the
            end, where `permute` and `grouped_mm` write zeros and `unpermute` adds nothing.
        num_experts: Number of experts E on this rank.

    Returns:
        An `ExpertSort` on the device of `ids`.

    Raises:
        ValueError: If `ids` is neither 1-D nor 2-D, has 2**31 or more elements, or `num_experts` is
            less than 1. With `UNIMOE_CHECKS=1` also if an id is negative (otherwise such a row
            is dropped as well).
        TypeError: If `ids` is not int32 or int64.

    Note:
        Not differentiable. A stable counting sort: bit-identical every run, without host
        synchronisation on a GPU.
    """
    _checks.check_tensor("ids", ids, "[T, K]" if ids.dim() != 1 else "[N]", _checks.INTEGERS)
    _checks.check_positive("num_experts", num_experts)
    if ids.numel() >= 2**31:
        raise ValueError(f"ids ({ids.numel()} elements) must have fewer than 2**31 elements")
    _checks.check_ids(ids)
    return ExpertSort(*_backends.call("expert_sort", ids.reshape(-1).contiguous(), num_experts))


def _fake(ids, num_experts):
    num_rows = ids.shape[0]
    return tuple(
        ids.new_empty((size,), dtype=torch.int32)
        for size in (num_rows, num_rows, num_experts, num_experts + 1)
    )


def _triton(ids, num_experts):
    from unimoe_kernels.ops.expert_sort import kernel

    return kernel.expert_sort(ids, num_experts)


_backends.declare(
    "expert_sort",
    "(Tensor ids, int num_experts) -> (Tensor row_order, Tensor inverse_order, "
    "Tensor tokens_per_expert, Tensor expert_offsets)",
    reference=reference.expert_sort,
    plain=plain.expert_sort,
    triton=_triton,
    fake=_fake,
)
