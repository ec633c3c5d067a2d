"""What the frozen encoders of all modalities have in common."""

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
    """A pretrained encoder that is never trained: always in eval mode, no gradients.

    A subclass builds its weights and calls :meth:`freeze` at the end of its `__init__`. Encoders of
    pictures have `encode_pictures`, those of recordings `sample_rate` and `encode_recording`. One
    that recipes name `module:Class` has a class method `pretrained`, which loads its weights.

    Args:
        name: what the encoder really is, e.g. `"BEATs iter3+"`.
        feature_size: channels of the features it returns.
        stand_in_for: the encoder of the paper that it replaces, e.g. `"CLIP ViT-L/14"`;
            None where it is the paper's own family.
        picture_tokens: feature rows of a picture; None for recordings.
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
        """The encoder on the meta device, without weights: for its sizes."""
        with torch.device("meta"):
            return cls()

    def encode_recordings(
        self, recordings: Sequence[NDArray[np.float32]], *max_rows: int
    ) -> list[list[Tensor]]:
        """`encode_recording` of several; a subclass may run them together."""
        return [self.encode_recording(samples, *max_rows) for samples in recordings]

    def freeze(self) -> None:
        """Puts every submodule in eval mode and turns off the gradients of all parameters."""
        self.train(False)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Stays in eval mode whatever `mode` says, so that a host's `train()` is harmless."""
        return super().train(False)

    def fingerprint(self) -> str:
        """Hash of the name and all weights; a cache of features is valid for this value only."""
        digest = hashlib.sha256(self.name.encode())
        for key, tensor in self.state_dict().items():
            digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()
