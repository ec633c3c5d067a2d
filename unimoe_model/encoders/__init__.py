"""Frozen, pretrained encoders: what the model sees and hears with."""

from importlib import import_module
from pathlib import Path

from unimoe_model.encoders.base import FrozenEncoder
from unimoe_model.encoders.outside import chosen_encoder, is_outside, outside_class

ENCODERS = {
    "clip-vit-large-patch14-336": ("clip", "ClipImageEncoder"),
    "whisper-small": ("whisper", "WhisperWindowEncoder"),
    "beats-iter3-plus-as2m": ("beats", "BeatsEncoder"),
}
"""Module and class of each encoder, by the name that configurations give it."""

_READERS = {
    "vision": ("clip", "ClipImageEncoder", "from_folder"),
    "speech": ("whisper", "WhisperWindowEncoder", "from_folder"),
    "audio": ("beats", "BeatsEncoder", "from_checkpoint"),
}


def build_encoder(name: str, sense: str) -> FrozenEncoder:
    """Builds a pretrained encoder by name, or reads one from disk.

    Args:
        name: one of `ENCODERS`; or, by `sense`, the folder of a CLIP or a Whisper in the layout of
            transformers, or the `.pt` file of a BEATs; or the `module:Class` of a subclass of
            `FrozenEncoder` with a `pretrained` of its own, which `permit_encoder` has permitted.
        sense: `"vision"`, `"speech"` or `"audio"`.

    Raises:
        ValueError: If there is no encoder of that name, no such file or folder, or the class is not
            permitted.
        OSError: If its weights are neither here nor can be downloaded.
    """
    name = chosen_encoder(name, sense)
    if name in ENCODERS or is_outside(name):
        return _class(name, sense).pretrained()
    _require_place(name, sense)
    module, cls, reader = _READERS[sense]
    return getattr(getattr(import_module(f"{__name__}.{module}"), cls), reader)(name)


def empty_encoder(name: str, sense: str) -> FrozenEncoder:
    """The encoder of a name without its weights, on the meta device: for its sizes.

    Args:
        name: as in `build_encoder`; of a `.pt` file the weights are read all the same.
        sense: see there.

    Raises:
        ValueError: As `build_encoder`.
    """
    if name in ENCODERS or is_outside(name):
        return _class(name, sense).empty()
    _require_place(name, sense)
    module, cls, _ = _READERS[sense]
    found = getattr(import_module(f"{__name__}.{module}"), cls)
    return found.empty_from_folder(name) if sense != "audio" else build_encoder(name, sense)


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
