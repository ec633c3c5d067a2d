"""Initialisation of connectors from pretrained models: Whisper (speech) and BLIP-2 (audio)."""

from typing import Any

import torch
from transformers import (
    Blip2Config,
    Blip2QFormerConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.models.blip_2.modeling_blip_2 import Blip2Model

from unimoe_model.config_fields import refuse_unknown_fields
from unimoe_model.encoders.outside import is_outside, outside_class
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.training.recipe import Recipe

SMALL = "whisper-small"
"""The Whisper whose sizes are the defaults of `UniMoEConfig`."""
_DECODER_FIELDS = (
    "d_model",
    "decoder_layers",
    "decoder_attention_heads",
    "decoder_ffn_dim",
    "max_target_positions",
)
_QFORMER_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "cross_attention_frequency",
    "hidden_act",
    "layer_norm_eps",
)


def connector_sizes(recipe: Recipe, kind: str) -> dict[str, Any] | None:
    """Fields of a connector's configuration, from the recipe or its pretrained model.

    Args:
        recipe: the recipe.
        kind: `"speech"` or `"audio"`.

    Returns:
        The fields; None for the defaults.

    Raises:
        ValueError: If the configuration of the pretrained model cannot be read, or the recipe names
            an unknown field.
    """
    connector = getattr(recipe, kind)
    if connector.pretrained is None:
        config = {"speech": WhisperConfig, "audio": Blip2QFormerConfig}[kind]
        where = f"{recipe.path}: connectors.{kind}.sizes"
        refuse_unknown_fields(connector.sizes or {}, config, where)
        return connector.sizes
    if connector.pretrained == SMALL:
        return None
    if kind == "speech":
        config = _whisper_config(connector.pretrained)
        return {name: getattr(config, name) for name in _DECODER_FIELDS}
    try:
        config = Blip2Config.from_pretrained(connector.pretrained).qformer_config
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{recipe.path}: connectors.audio.pretrained ({connector.pretrained}) must be a BLIP-2:"
            f" {error}"
        ) from error
    return {name: getattr(config, name) for name in _QFORMER_FIELDS}


def load_connector_bodies(model: UniMoEForConditionalGeneration, recipe: Recipe) -> None:
    """Loads pretrained weights into the connectors of a model, except for their projectors.

    If a Q-Former was trained on features of another width, keys and values of its cross-attention
    keep their initial weights.

    Raises:
        ValueError: If weights cannot be read or have wrong shapes.
    """
    if recipe.speech.pretrained is not None:
        model.model.speech_connector.load_decoder(_whisper_decoder(recipe.speech.pretrained))
    if recipe.audio.pretrained is not None:
        blip = Blip2Model.from_pretrained(recipe.audio.pretrained, dtype=torch.float32)
        connector = model.model.audio_connector
        own = connector.qformer.state_dict()
        state = {
            name: tensor if tensor.shape == own[name].shape else own[name]
            for name, tensor in blip.qformer.state_dict().items()
            if name in own
        }
        connector.qformer.load_state_dict(state)


def _whisper_config(name: str) -> WhisperConfig:
    if is_outside(name):
        return outside_class(name, "speech").decoder_config()
    return WhisperConfig.from_pretrained(_source(name))


def _whisper_decoder(name: str) -> dict[str, torch.Tensor]:
    if is_outside(name):
        return outside_class(name, "speech").pretrained_decoder().state_dict()
    source = _source(name)
    return WhisperForConditionalGeneration.from_pretrained(
        source, dtype=torch.float32
    ).model.decoder.state_dict()


def _source(name: str) -> str:
    return "openai/whisper-small" if name == SMALL else name
