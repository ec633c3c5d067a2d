"""Connectors: trainable modules that turn frozen encoder features into soft tokens of the LLM."""

from torch import nn

from unimoe_model.configuration import UniMoEConfig
from unimoe_model.connectors.audio import AudioConnector
from unimoe_model.connectors.image import ImageConnector
from unimoe_model.connectors.speech import SpeechConnector
from unimoe_model.connectors.vocabulary import vocabulary_mixture


def build_connector(config: UniMoEConfig, kind: str) -> nn.Module:
    """Builds a connector with random weights.

    Args:
        config: the model's configuration.
        kind: `"image"` (also for videos), `"speech"` or `"audio"`.
    """
    width = config.text_config.hidden_size
    if kind == "image":
        return ImageConnector(
            config.vision_feature_size,
            width,
            config.vision_intermediate_size,
            config.vision_pooled_tokens,
        )
    return {"speech": SpeechConnector, "audio": AudioConnector}[kind](
        getattr(config, f"{kind}_feature_size"),
        width,
        getattr(config, f"{kind}_num_queries"),
        getattr(config, f"{kind}_connector"),
    )


__all__ = [
    "AudioConnector",
    "ImageConnector",
    "SpeechConnector",
    "build_connector",
    "vocabulary_mixture",
]
