"""How far from float64 a matmul may be."""

import torch


def error_limit(torchs: float, dtype: torch.dtype, depth: int) -> float:
    """The largest relative error that a right result has.

    Args:
        torchs: relative error of torch's own matmuls, whose sums are in pieces.
        dtype: of operands and results.
        depth: numbers in the longest sum. Each addition rounds by half of eps at most; one after
            the other they walk at random, to about `eps * sqrt(depth)`, where sums have the dtype
            of the result.
    """
    eps = torch.finfo(dtype).eps
    walk = depth**0.5 if dtype == torch.float32 else 4
    return 2 * torchs + walk * eps
