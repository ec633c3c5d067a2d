"""Frozen features, computed once and kept on disk."""

import hashlib
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unimoe_model.tensor_files import save_tensors


class FeatureCache:
    """A folder of safetensors files, one for each (name, fingerprint).

    A file appears under its final name only when it is whole, so a killed run leaves nothing
    that a later run would trust. A file that is damaged all the same is reported on stderr and
    built again.

    Args:
        root: folder of the files; made when the first one is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def path(self, name: str, fingerprint: str) -> Path:
        """Where the features of `name` with this fingerprint lie, written yet or not."""
        digest = hashlib.sha256(fingerprint.encode()).hexdigest()
        return self.root / f"{name}-{digest[:12]}.safetensors"

    def load_or_build(
        self, name: str, fingerprint: str, build: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Reads the features, or computes and keeps them when no sound file is there.

        Args:
            name: first part of the file name, e.g. `"easy_vqa-train"`.
            fingerprint: everything the features depend on (data, encoder, settings) in one text;
                another text is another file.
            build: computes the features; called at most once.

        Raises:
            ValueError: `name` cannot be part of a file name, or `build` returned nothing.
        """
        if not name or Path(name).name != name:
            raise ValueError(f"name ({name!r}) must be a plain file name without folders")
        path = self.path(name, fingerprint)
        if path.exists():
            try:
                return _read(path, fingerprint)
            except (SafetensorError, OSError, ValueError) as error:
                print(f"feature cache: {path} is damaged ({error}); rebuilding", file=sys.stderr)
        features = {key: tensor.detach().contiguous().cpu() for key, tensor in build().items()}
        if not features:
            raise ValueError(f"build of {name!r} returned no tensors, expected at least one")
        _write(path, fingerprint, features)
        return features


def _checksum(features: dict[str, Tensor]) -> str:
    """CRC-32 over all bytes: a few hundred ms a GB, and the header alone shows no flipped bit."""
    value = 0
    for key in sorted(features):
        value = zlib.crc32(features[key].flatten().view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def _read(path: Path, fingerprint: str) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        features = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if metadata.get("fingerprint") != fingerprint:
        raise ValueError("its fingerprint is not the one asked for")
    if metadata.get("crc32") != _checksum(features):
        raise ValueError("its checksum does not fit its content")
    return features


def _write(path: Path, fingerprint: str, features: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"fingerprint": fingerprint, "crc32": _checksum(features)}
    save_tensors(path, features, metadata)
