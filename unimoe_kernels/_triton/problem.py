"""The matmul that a tile is chosen for, and the tile itself."""

from __future__ import annotations

from typing import NamedTuple

import torch

KINDS = ("rows", "gated", "gated_backward", "weights", "low_rank", "low_rank_weights")
MAX_ROWS = 4096  # beyond it the number of rows does not affect the choice


class Tile(NamedTuple):
    """Shape of a tile and how a program computes it.

    `descriptors` requests tensor descriptors (TMA, sm_90 and later) for the operands that meet
    their requirements; see `descriptors.py`.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    descriptors: bool = False

    def constants(self) -> dict[str, int]:
        """Returns the constants of a launch, by parameter name."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


class Problem(NamedTuple):
    """A matmul as the choice of its tile sees it.

    Attributes:
        kind: `"rows"` (rows times weights), `"gated"` (the same with gate and up side by side),
            `"gated_backward"`, `"weights"` (the gradient of weights), `"low_rank"` (rows times
            narrow weights, times wide ones) or `"low_rank_weights"`.
        inner: Length of the sums; 0 for `"weights"`, which sums over rows.
        width: Columns of the result; for `"gated"` those of one half.
        height: Rows of the result of one expert for `"weights"`, the rank for `"low_rank"` and
            `"low_rank_weights"`, else 0.
        experts: Number of experts.
        top_k: Rows of a token if rows are gathered from tokens, else 1.
        dtype: Dtype of the operands.
        rows: Mean number of rows of an expert, a power of 2.
        tf32: Whether float32 is multiplied as TF32 on the tensor cores.
    """

    kind: str
    inner: int
    width: int
    height: int
    experts: int
    top_k: int
    dtype: torch.dtype
    rows: int
    tf32: bool = False
