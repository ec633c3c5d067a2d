"""Features and labels of a set of pictures, clips or recordings."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MediaSet:
    """Frozen features of `M` items, padded to the longest.

    Attributes:
        features: `[M, n, C]` float16; rows past an item's length are padding.
        lengths: `[M]` int64, valid rows of each item, between 1 and `n`.
        labels: one dict of label name -> value for each item; a label that is not known is left
            out.

    Raises:
        ValueError: If shapes, dtypes or lengths do not fit together.
    """

    features: Tensor
    lengths: Tensor
    labels: list[dict[str, str]]

    def __post_init__(self) -> None:
        features, lengths = self.features, self.lengths
        if features.ndim != 3 or features.dtype != torch.float16:
            raise ValueError(
                f"features ({features.dtype} of shape {list(features.shape)}) must be float16 "
                "of shape [M, n, C]"
            )
        count, rows, _ = features.shape
        if lengths.shape != (count,) or lengths.dtype != torch.int64:
            raise ValueError(
                f"lengths ({lengths.dtype} of shape {list(lengths.shape)}) must be int64 of "
                f"shape [{count}]"
            )
        if len(self.labels) != count:
            raise ValueError(f"labels ({len(self.labels)}) must be as many as features ({count})")
        if count and not 1 <= int(lengths.min()) <= int(lengths.max()) <= rows:
            raise ValueError(
                f"lengths ({int(lengths.min())} to {int(lengths.max())}) must be between 1 and "
                f"the rows of features ({rows})"
            )

    def __len__(self) -> int:
        return len(self.labels)
