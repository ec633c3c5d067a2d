"""Frozen, pretrained encoders: what the model sees and hears with."""

from importlib import import_module

from unimoe_model.encoders.base import FrozenEncoder

ENCODERS = {
    "efficientnet-lite0": ("efficientnet_lite", "EfficientNetLite0"),
    "whisper-tiny.en": ("whisper", "WhisperSpeechEncoder"),
    "aisfx": ("aisfx", "AisfxAudioEncoder"),
}
"""Module and class of each encoder, by the name that configurations give it."""


def build_encoder(name: str) -> FrozenEncoder:
    """Builds a pretrained encoder by name.

    Raises:
        ValueError: if there is no encoder of that name.
        MissingAssetError: if the package that carries its weights is not installed.
    """
    if name not in ENCODERS:
        raise ValueError(f"encoder ({name!r}) must be one of {sorted(ENCODERS)}")
    module, cls = ENCODERS[name]
    return getattr(import_module(f"{__name__}.{module}"), cls).pretrained()


__all__ = ["ENCODERS", "FrozenEncoder", "build_encoder"]
