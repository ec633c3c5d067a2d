"""Image and video connector: a two-layer MLP; a video is the mean of its frames' soft tokens."""

import torch
from einops import rearrange, reduce
from torch import nn
from torch.nn import functional as F


class ImageConnector(nn.Module):
    """Linear, GELU, Linear (`mlp2x_gelu`), for images and for the frames of videos.

    It maps each patch to a soft token or, with `pooled_tokens`, the mean of the patches, after a
    layer norm without weights, to that many soft tokens.

    Args:
        feature_size: width of the vision encoder's features.
        hidden_size: width of the LLM.
        intermediate_size: width of the hidden layer; None for `hidden_size`, as released.
        pooled_tokens: number of soft tokens of the mean of the patches; None for a soft token for
            each patch, as released.

    Reference: arXiv:2405.11273, equations 2 and 3; the mean is taken after the MLP, as released.
    """

    def __init__(
        self,
        feature_size: int,
        hidden_size: int,
        intermediate_size: int | None = None,
        pooled_tokens: int | None = None,
    ):
        super().__init__()
        self.pooled_tokens = pooled_tokens
        width = hidden_size if intermediate_size is None else intermediate_size
        self.projector = nn.Sequential(
            nn.Linear(feature_size, width),
            nn.GELU(),
            nn.Linear(width, hidden_size * (pooled_tokens or 1)),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Maps patches to soft tokens.

        Args:
            features: `[B, n, C]` of images or `[B, frames, n, C]` of videos.

        Returns:
            `[B, n, D]`, or `[B, pooled_tokens, D]`.
        """
        if self.pooled_tokens is None:
            tokens = self.projector(features)
        else:
            pooled = F.layer_norm(features.mean(-2), features.shape[-1:])
            tokens = rearrange(self.projector(pooled), "... (n d) -> ... n d", n=self.pooled_tokens)
        if features.dim() == 4:
            tokens = reduce(tokens, "b frames n d -> b n d", "mean")
        return tokens
