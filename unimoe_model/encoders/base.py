"""Base class of the frozen encoders."""

import hashlib
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


def check_waveforms(waveforms: Tensor) -> None:
    """Raises ValueError unless waveforms are floating point of shape `[B, samples]`."""
    if waveforms.ndim != 2 or not waveforms.is_floating_point():
        raise ValueError(
            f"waveforms ({waveforms.dtype} of shape {list(waveforms.shape)}) must be floating "
            "point of shape [B, samples]"
        )


class FrozenEncoder(nn.Module):
    """A pretrained encoder that is never trained: always in eval mode and without gradients.

    A subclass creates its weights and calls :meth:`freeze` at the end of its `__init__`. Encoders
    of images define `encode_pictures`; encoders of recordings define `sample_rate` (Hz) and
    `encode_recording`. A subclass that recipes select as `module:Class` also defines a class method
    `pretrained`, which loads its weights.

    Args:
        name: name of the encoder, such as `"BEATs iter3+"`.
        feature_size: width of the features.
        stand_in_for: the paper's encoder that it replaces, such as `"CLIP ViT-L/14"`; None for the
            paper's own families.
        picture_tokens: feature rows per picture; None for recordings.
    """

    def __init__(
        self,
        name: str,
        feature_size: int,
        stand_in_for: str | None = None,
        picture_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.feature_size = feature_size
        self.stand_in_for = stand_in_for
        self.picture_tokens = picture_tokens

    @classmethod
    def empty(cls) -> Self:
        """Builds the encoder on the meta device, without weights, to inspect its sizes."""
        with torch.device("meta"):
            return cls()

    def encode_recordings(
        self, recordings: Sequence[NDArray[np.float32]], *max_rows: int
    ) -> list[list[Tensor]]:
        """Encodes several recordings; a subclass may batch them.

        Args:
            recordings: `[samples]` float32 each, at `sample_rate`.
            *max_rows: passed to `encode_recording`.

        Returns:
            For each recording, the features of its pieces, `[rows, feature_size]`.
        """
        return [self.encode_recording(samples, *max_rows) for samples in recordings]

    def freeze(self) -> None:
        """Switches all submodules to eval mode and disables gradients of all parameters."""
        self.train(False)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Stays in eval mode whatever `mode` is, so that `train()` of a parent has no effect."""
        return super().train(False)

    def fingerprint(self) -> str:
        """Hash of the name and all weights, which identifies cached features."""
        digest = hashlib.sha256(self.name.encode())
        for key, tensor in self.state_dict().items():
            digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()
