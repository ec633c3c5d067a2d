"""Frozen, pretrained encoders: what the model sees and hears with."""

from importlib import import_module
from pathlib import Path

from unimoe_model.encoders.base import FrozenEncoder

ENCODERS = {
    "clip-vit-large-patch14-336": ("clip", "ClipImageEncoder"),
    "whisper-small": ("whisper_windows", "WhisperWindowEncoder"),
    "beats-iter3-plus-as2m": ("beats", "BeatsEncoder"),
    "efficientnet-lite0": ("efficientnet_lite", "EfficientNetLite0"),
    "whisper-tiny.en": ("whisper", "WhisperSpeechEncoder"),
    "aisfx": ("aisfx", "AisfxAudioEncoder"),
}
"""Module and class of each encoder, by the name that configurations give it."""

_READERS = {
    "vision": ("clip", "ClipImageEncoder", "from_folder"),
    "speech": ("whisper_windows", "WhisperWindowEncoder", "from_folder"),
    "audio": ("beats", "BeatsEncoder", "from_checkpoint"),
}


def build_encoder(name: str, sense: str) -> FrozenEncoder:
    """Builds a pretrained encoder by name, or reads one from disk.

    Args:
        name: one of `ENCODERS`; or, by `sense`, the folder of a CLIP or a Whisper in the layout of
            transformers, or the `.pt` file of a BEATs.
        sense: `"vision"`, `"speech"` or `"audio"`.

    Raises:
        ValueError: If there is no encoder of that name, and no such file or folder.
        MissingAssetError: If the package that carries its weights is not installed.
    """
    if name in ENCODERS:
        module, cls = ENCODERS[name]
        return getattr(import_module(f"{__name__}.{module}"), cls).pretrained()
    if not name or not Path(name).exists():
        raise ValueError(
            f"{sense} encoder ({name!r}) must be one of {sorted(ENCODERS)}, or a file or folder"
        )
    module, cls, reader = _READERS[sense]
    return getattr(getattr(import_module(f"{__name__}.{module}"), cls), reader)(name)


__all__ = ["ENCODERS", "FrozenEncoder", "build_encoder"]
