"""aiSFX: the sound encoder, a stand-in for BEATs.

A convolutional network of the PANNs kind, trained on sound-effect libraries: A. B. Ma and A. Lerch,
"Representation Learning for the Automatic Indexing of Sound Effects Libraries", ISMIR 2022
(weights CC BY 4.0). Here the network ends before its maximum over time, so that features are a
sequence.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from examples.stand_ins.assets import asset_file
from unimoe_model.encoders import FrozenEncoder
from unimoe_model.encoders.base import check_waveforms

SAMPLE_RATE = 44_100
WINDOW = 2048
HOP = 1024
MEL_BANDS = 96
HOPS_PER_FRAME = 8  # three poolings by two
LOG_SPAN = 9.457798957824707  # largest log-mel value over the data that the network was trained on
PIECE_SAMPLES = 30 * SAMPLE_RATE
MIN_SAMPLES = (HOPS_PER_FRAME - 1) * HOP
_BATCH_SIZE = 16


def mel_filters() -> Tensor:
    """96 triangles on the HTK mel scale from 0 to 22,050 Hz, each of unit sum.

    Returns:
        `[1025, 96]` float32, from FFT bins to bands.
    """
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, MEL_BANDS + 2) / 2595) - 1)
    bins = np.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    triangles = np.maximum(0, np.minimum(rising, falling))
    # The lowest bands are narrower than an FFT bin; one that no bin falls into stays zero.
    return torch.from_numpy(triangles / np.maximum(triangles.sum(axis=0), 1e-10)).float()


class _ConvBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.bn2(self.conv2(x)).relu()


class AisfxAudioEncoder(FrozenEncoder):
    """The frozen aiSFX network over clips of sound at 44.1 kHz.

    Built with random weights; `pretrained` loads the published ones.
    """

    sample_rate = SAMPLE_RATE

    def __init__(self) -> None:
        super().__init__("aiSFX", feature_size=512, stand_in_for="BEATs")
        self.conv_block1 = _ConvBlock(1, 64)
        self.conv_block2 = _ConvBlock(64, 128)
        self.conv_block3 = _ConvBlock(128, 256)
        self.conv_block4 = _ConvBlock(256, 512)
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)
        self.register_buffer("mel_filters", mel_filters(), persistent=False)
        self.to(memory_format=torch.channels_last)
        self.freeze()

    @classmethod
    def pretrained(cls) -> "AisfxAudioEncoder":
        """Loads the weights of the authors.

        Raises:
            MissingAssetError: If the package that carries the weights is not installed.
            ValueError: If its checkpoint is truncated, damaged or of another network.
        """
        encoder = cls()
        _load_checkpoint(encoder, asset_file("aisfx", "models", "checkpoint.pth"))
        return encoder

    def log_mel(self, waveforms: Tensor) -> Tensor:
        """The network's input: `log10(1 + 1e4 * mel power) / 9.4578` of sound with peak level 1.

        Args:
            waveforms: `[B, samples]` float32 at 44.1 kHz, any level.

        Returns:
            `[B, 1 + samples // 1024, 96]` float32, between 0 and about 1.
        """
        peaks = waveforms.abs().amax(dim=1, keepdim=True)
        waveforms = waveforms / torch.where(peaks > 0, peaks, 1.0)
        spectrum = torch.stft(
            waveforms,
            WINDOW,
            HOP,
            window=self.window.float(),
            pad_mode="constant",
            return_complex=True,
        )
        mel = spectrum.abs().square().transpose(1, 2) @ self.mel_filters.float()
        return torch.log10(1 + 1e4 * mel) / LOG_SPAN

    def forward(self, waveforms: Tensor) -> Tensor:
        """Encodes clips of one length.

        Args:
            waveforms: `[B, samples]` floating point at 44.1 kHz, any level.

        Returns:
            `[B, (1 + samples // 1024) // 8, 512]` in the dtype of the weights: a frame every
            186 ms, averaged over frequency.

        Raises:
            ValueError: If `waveforms` have a wrong shape or dtype, or are too short for one frame.
        """
        check_waveforms(waveforms)
        if waveforms.shape[1] < MIN_SAMPLES:
            raise ValueError(
                f"samples ({waveforms.shape[1]}) must be at least {MIN_SAMPLES} (0.17 s at "
                "44.1 kHz), enough for one frame"
            )
        weight = self.conv_block1.conv1.weight
        if waveforms.shape[0] == 0:
            frames = (1 + waveforms.shape[1] // HOP) // HOPS_PER_FRAME
            return weight.new_empty(0, frames, self.feature_size)
        with torch.no_grad():
            mel = self.log_mel(waveforms.to(weight.device, torch.float32))
            x = mel.to(weight.dtype).unsqueeze(1).contiguous(memory_format=torch.channels_last)
            for block in (self.conv_block1, self.conv_block2, self.conv_block3):
                x = nn.functional.max_pool2d(block(x), 2)
            return self.conv_block4(x).mean(dim=3).transpose(1, 2)

    def encode_recording(self, samples: NDArray[np.float32]) -> list[Tensor]:
        """Encodes a recording of any length in pieces of 30 s.

        Args:
            samples: `[samples]` float32 at 44.1 kHz.

        Returns:
            `[rows, 512]` float32 of each piece. The last piece may be shorter, and is dropped if
            it is too short for a row.
        """
        return self.encode_recordings([samples])[0]

    def encode_recordings(self, recordings: Sequence[NDArray[np.float32]]) -> list[list[Tensor]]:
        """Encodes several recordings; pieces of equal length share batches."""
        pieces = [_pieces(torch.from_numpy(samples)) for samples in recordings]
        flat = [piece for own in pieces for piece in own]
        of_length: dict[int, list[int]] = defaultdict(list)
        for index, piece in enumerate(flat):
            of_length[len(piece)].append(index)
        rows: dict[int, Tensor] = {}
        for members in of_length.values():
            for start in range(0, len(members), _BATCH_SIZE):
                batch = members[start : start + _BATCH_SIZE]
                encoded = self(torch.stack([flat[index] for index in batch])).float()
                rows |= zip(batch, encoded, strict=True)
        found = iter([rows[index] for index in range(len(flat))])
        return [[next(found) for _ in own] for own in pieces]


def _pieces(samples: Tensor) -> list[Tensor]:
    pieces = list(samples.split(PIECE_SAMPLES))
    return pieces[:-1] if len(pieces) > 1 and len(pieces[-1]) < MIN_SAMPLES else pieces


def _numpy_scalars() -> list[object]:
    """Types that torch must be allowed to unpickle: the file also contains NumPy integers."""
    scalar = np.int64(0).__reduce__()[0]
    # The file was pickled by a NumPy with an older module name.
    return [np.dtype, type(np.dtype(np.int64)), (scalar, "numpy.core.multiarray.scalar")]


def _load_checkpoint(encoder: AisfxAudioEncoder, path: Path) -> None:
    prefix = "embedding_net."
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            weights, _ = torch.load(path, map_location="cpu", weights_only=True)
        encoder.load_state_dict(
            {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        )
    except (
        RuntimeError,
        EOFError,
        AttributeError,
        TypeError,
        ValueError,
        UnpicklingError,
    ) as error:
        raise ValueError(f"{path}: expected the checkpoint of aiSFX 0.1.2: {error}") from error
