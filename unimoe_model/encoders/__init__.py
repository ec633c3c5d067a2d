"""Frozen, pretrained encoders of images, video, speech and audio."""

import warnings
from importlib import import_module
from pathlib import Path

from unimoe_model.encoders.base import FrozenEncoder
from unimoe_model.encoders.outside import chosen_encoder, is_outside, outside_class

ENCODERS = {
    "clip-vit-large-patch14-336": ("clip", "ClipImageEncoder"),
    "whisper-small": ("whisper", "WhisperWindowEncoder"),
    "beats-iter3-plus-as2m": ("beats", "BeatsEncoder"),
}
"""Module and class of each encoder, by its name in configurations."""

_READERS = {
    "vision": ("clip", "ClipImageEncoder", "from_folder"),
    "speech": ("whisper", "WhisperWindowEncoder", "from_folder"),
    "audio": ("beats", "BeatsEncoder", "from_checkpoint"),
}


def build_encoder(name: str, sense: str) -> FrozenEncoder:
    """Builds a pretrained encoder by name, or reads one from disk.

    Args:
        name: a name in `ENCODERS`; the folder of a CLIP (vision) or Whisper (speech) in the layout
            of transformers; the `.pt` file of a BEATs (audio); or the `module:Class` of a subclass
            of `FrozenEncoder` with a class method `pretrained`, permitted by `permit_encoder`.
        sense: `"vision"`, `"speech"` or `"audio"`.

    Raises:
        ValueError: If the name is unknown, or the class is not permitted.
        OSError: If the weights are neither on disk nor can be downloaded.

    Warns:
        UserWarning: If `choose_encoders` selected a class other than the named one.
    """
    named, name = name, chosen_encoder(name, sense)
    if name != named and _is_class(name) and _is_class(named):
        warnings.warn(
            f"{sense} encoder ({name}) replaces {named}, which the model names; a model understands"
            " only the features that it was trained on",
            stacklevel=2,
        )
    if _is_class(name):
        return _class(name, sense).pretrained()
    _require_place(name, sense)
    module, cls, reader = _READERS[sense]
    return getattr(getattr(import_module(f"{__name__}.{module}"), cls), reader)(name)


def empty_encoder(name: str, sense: str) -> FrozenEncoder:
    """Builds an encoder on the meta device, without weights, to inspect its sizes.

    Args:
        name: as in `build_encoder`; a `.pt` file is read with its weights.
        sense: `"vision"`, `"speech"` or `"audio"`.

    Raises:
        ValueError: If the name is unknown, or the class is not permitted.
    """
    if _is_class(name):
        return _class(name, sense).empty()
    _require_place(name, sense)
    module, cls, _ = _READERS[sense]
    found = getattr(import_module(f"{__name__}.{module}"), cls)
    return found.empty_from_folder(name) if sense != "audio" else build_encoder(name, sense)


def _is_class(name: str) -> bool:
    """Whether a name is that of a class, not of a file or folder."""
    return name in ENCODERS or is_outside(name)


def _class(name: str, sense: str) -> type[FrozenEncoder]:
    if is_outside(name):
        return outside_class(name, sense)
    module, cls = ENCODERS[name]
    return getattr(import_module(f"{__name__}.{module}"), cls)


def _require_place(name: str, sense: str) -> None:
    if not name or not Path(name).exists():
        raise ValueError(
            f"{sense} encoder ({name!r}) must be one of {sorted(ENCODERS)}, a file or folder, or"
            " module:Class"
        )


__all__ = ["ENCODERS", "FrozenEncoder", "build_encoder", "empty_encoder"]
