"""Image and video connector: a two-layer MLP; a video is the mean of its frames' soft tokens."""

import torch
from einops import reduce
from torch import nn


class ImageConnector(nn.Module):
    """Linear, GELU, Linear (`mlp2x_gelu`), for images and for the frames of videos.

    Args:
        feature_size: width of the vision encoder's features.
        hidden_size: width of the LLM.
        intermediate_size: width of the hidden layer; None for `hidden_size`, as released.

    Reference: arXiv:2405.11273, equations 2 and 3; the mean is taken after the MLP, as released.
    """

    def __init__(self, feature_size: int, hidden_size: int, intermediate_size: int | None = None):
        super().__init__()
        width = hidden_size if intermediate_size is None else intermediate_size
        self.projector = nn.Sequential(
            nn.Linear(feature_size, width), nn.GELU(), nn.Linear(width, hidden_size)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Soft tokens `[B, n, D]` of images `[B, n, C]` or videos `[B, frames, n, C]`."""
        tokens = self.projector(features)
        if features.dim() == 4:
            tokens = reduce(tokens, "b frames n d -> b n d", "mean")
        return tokens
