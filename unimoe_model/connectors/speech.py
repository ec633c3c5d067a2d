"""Speech connector: a Whisper decoder that maps encoder frames to a fixed number of soft tokens."""

import torch
from torch import nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperDecoder

# The decoder's inputs are queries, not tokens: these fields override any vocabulary.
_NO_TOKENS = {
    "vocab_size": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "decoder_start_token_id": 0,
    "use_cache": False,
}


class SpeechConnector(nn.Module):
    """Learned queries through a Whisper decoder, then one Linear to the LLM's width.

    The queries attend causally to each other, with Whisper's learned positions, and to all encoder
    frames. The decoder's token embedding is never used, so it is built with a single row.

    Args:
        feature_size: width of the speech encoder's features; must be the decoder's `d_model`.
        hidden_size: width of the LLM.
        num_queries: soft tokens per clip.
        decoder: fields of `WhisperConfig` for the decoder.

    Raises:
        ValueError: If `feature_size` is not `d_model` or there are more queries than positions.

    Reference: arXiv:2405.11273, equations 7 to 9; the release uses the whole Whisper-small decoder.
    """

    def __init__(self, feature_size: int, hidden_size: int, num_queries: int, decoder: dict):
        super().__init__()
        config = WhisperConfig(**{"dropout": 0.0, **decoder, **_NO_TOKENS})
        if feature_size != config.d_model:
            raise ValueError(
                f"feature_size ({feature_size}) must be d_model of the speech connector's decoder"
                f" ({config.d_model})"
            )
        if not 1 <= num_queries <= config.max_target_positions:
            raise ValueError(
                f"num_queries ({num_queries}) must be between 1 and max_target_positions"
                f" ({config.max_target_positions})"
            )
        self.query_tokens = nn.Parameter(torch.zeros(1, num_queries, config.d_model))
        self.decoder = WhisperDecoder(config)
        self.projector = nn.Linear(config.d_model, hidden_size)

    def load_decoder(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Loads pretrained weights of a Whisper decoder, with the keys of `WhisperDecoder`."""
        wanted = self.decoder.state_dict()
        weights = {k: v for k, v in state_dict.items() if k != "embed_tokens.weight"}
        weights["embed_tokens.weight"] = wanted["embed_tokens.weight"]
        self.decoder.load_state_dict(weights)

    def hidden_states(self, features: torch.Tensor) -> torch.Tensor:
        """Query states `[B, num_queries, d_model]` of encoder frames `[B, frames, d_model]`."""
        queries = self.query_tokens.expand(features.shape[0], -1, -1).to(features.dtype)
        return self.decoder(inputs_embeds=queries, encoder_hidden_states=features).last_hidden_state

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Maps encoder frames `[B, frames, d_model]` to soft tokens `[B, num_queries, D]`."""
        return self.projector(self.hidden_states(features))
