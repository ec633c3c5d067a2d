"""Audio connector: a BLIP-2 Q-Former that maps encoder frames to a fixed number of soft tokens."""

import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel


class AudioConnector(nn.Module):
    """Learned queries through a Q-Former, then one Linear to the LLM's width.

    The queries attend to each other in both directions and, in every
    `cross_attention_frequency`-th layer, to all encoder frames.

    Args:
        feature_size: width of the audio encoder's features.
        hidden_size: width of the LLM.
        num_queries: soft tokens per clip.
        qformer: fields of `Blip2QFormerConfig`.

    Raises:
        ValueError: If `num_queries` is below 1.

    Note:
        The release initialises its queries to zero. A Q-Former has no positions, so equal queries
        stay equal throughout training; here they are drawn from a normal distribution (std 0.02).

    Reference: arXiv:2405.11273, equations 10 and 11.
    """

    def __init__(self, feature_size: int, hidden_size: int, num_queries: int, qformer: dict):
        super().__init__()
        if num_queries < 1:
            raise ValueError(f"num_queries ({num_queries}) must be at least 1")
        config = Blip2QFormerConfig(**{**qformer, "encoder_hidden_size": feature_size})
        self.query_tokens = nn.Parameter(torch.empty(1, num_queries, config.hidden_size))
        nn.init.normal_(self.query_tokens, std=0.02)
        self.qformer = Blip2QFormerModel(config)
        self.projector = nn.Linear(config.hidden_size, hidden_size)

    def hidden_states(
        self, features: torch.Tensor, features_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Query states `[B, num_queries, hidden]`; see `forward`."""
        queries = self.query_tokens.expand(features.shape[0], -1, -1).to(features.dtype)
        return self.qformer(
            query_embeds=queries,
            encoder_hidden_states=features,
            encoder_attention_mask=None if features_mask is None else features_mask.long(),
        ).last_hidden_state

    def forward(
        self, features: torch.Tensor, features_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Maps encoder frames to soft tokens.

        Args:
            features: `[B, frames, feature_size]`.
            features_mask: `[B, frames]` bool, False on padding; None attends to all frames, as the
                release does.

        Returns:
            `[B, num_queries, D]`.
        """
        return self.projector(self.hidden_states(features, features_mask))
