"""Base class of small Whisper encoders whose weights come in pip packages.

They are stand-ins for the paper's Whisper small. The decoder initialises the speech connector.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperDecoder, WhisperEncoder

from examples.stand_ins.ctranslate2 import whisper_state_dict
from unimoe_model.encoders.base import FrozenEncoder, check_waveforms

SAMPLE_RATE = 16_000
SAMPLES_PER_FRAME = 320  # a mel frame every 160 samples, halved by the second convolution
MAX_SAMPLES = 30 * SAMPLE_RATE
POOL = 2  # frames averaged into one row of a clip's features: 25 rows a second
TAIL_SAMPLES = SAMPLE_RATE  # silence after a clip; see `encode_clips`

MAX_ROWS = (MAX_SAMPLES - TAIL_SAMPLES) // (POOL * SAMPLES_PER_FRAME)


class WindowedWhisperEncoder(WhisperEncoder):
    """The Whisper encoder of transformers for windows shorter than 30 s.

    Whisper was trained on clips padded with silence to 30 s, and transformers requires that length,
    which is 20 times the length of a spoken word. Modules and weights are those of the parent
    class; a shorter window uses the first positions, and outputs for 30 s are unchanged.
    """

    def forward(self, input_features: Tensor) -> Tensor:
        """Encodes log-mel frames.

        Args:
            input_features: `[B, 80, mel frames]`, an even number of frames, at most 3000.

        Returns:
            `[B, mel frames / 2, width]`.
        """
        hidden = nn.functional.gelu(self.conv1(input_features))
        hidden = nn.functional.gelu(self.conv2(hidden)).transpose(1, 2)
        hidden = hidden + self.embed_positions.weight[: hidden.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden, None)
        return self.layer_norm(hidden)


class PackagedWhisperEncoder(FrozenEncoder, ABC):
    """The frozen encoder of a Whisper; a subclass defines its sizes and the source of its weights.

    Args:
        state: state dict of `WhisperEncoder` of transformers; :meth:`pretrained` loads OpenAI's.
    """

    title: str
    """Name of the Whisper."""
    sample_rate = SAMPLE_RATE
    samples_per_frame = SAMPLES_PER_FRAME

    def __init__(self, state: dict[str, Tensor]) -> None:
        config = self.decoder_config()
        super().__init__(self.title, feature_size=config.d_model)
        self.encoder = self._build(WindowedWhisperEncoder, state)
        self.feature_extractor = WhisperFeatureExtractor()
        self.freeze()

    @classmethod
    @abstractmethod
    def decoder_config(cls) -> WhisperConfig:
        """Sizes of encoder and decoder."""

    @classmethod
    @abstractmethod
    def weights(cls) -> dict[str, Tensor]:
        """Variables of the CTranslate2 model with OpenAI's weights.

        Raises:
            MissingAssetError: If the package that carries them is not installed.
            ValueError: If its weight file is truncated or damaged.
        """

    @classmethod
    def pretrained(cls) -> "PackagedWhisperEncoder":
        """Loads the encoder with OpenAI's weights; raises the errors of `weights`."""
        return cls(whisper_state_dict(cls.weights(), "encoder"))

    @classmethod
    def pretrained_decoder(cls) -> WhisperDecoder:
        """Loads the decoder with OpenAI's weights, float32; raises the errors of `weights`."""
        return cls._build(WhisperDecoder, whisper_state_dict(cls.weights(), "decoder"))

    @classmethod
    def empty(cls) -> "PackagedWhisperEncoder":
        """Builds the encoder on the meta device, without weights, to inspect its sizes."""
        with torch.device("meta"):
            return cls(WindowedWhisperEncoder(cls.decoder_config()).state_dict())

    @classmethod
    def _build(cls, module_class: type[nn.Module], state: dict[str, Tensor]) -> nn.Module:
        # The meta device leaves the random generator, which the caller may have seeded, unchanged.
        with torch.device("meta"):
            module = module_class(cls.decoder_config())
        try:
            module.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ValueError(f"state must be that of {cls.title}: {error}") from error
        return module

    def forward(self, waveforms: Tensor) -> Tensor:
        """Encodes clips at 16 kHz, each padded with silence to whole frames of 20 ms.

        Args:
            waveforms: `[B, samples]` floating point in -1..1; pad short clips with zeros.

        Returns:
            `[B, ceil(samples / 320), width]` in the dtype of the weights.

        Raises:
            ValueError: If `waveforms` have a wrong shape or dtype, no samples, or more than 30 s.
        """
        check_waveforms(waveforms)
        if not 0 < waveforms.shape[1] <= MAX_SAMPLES:
            raise ValueError(
                f"samples ({waveforms.shape[1]}) must be between 1 and {MAX_SAMPLES} (30 s at "
                "16 kHz): encode longer recordings in pieces"
            )
        weight = self.encoder.conv1.weight
        window = -(-waveforms.shape[1] // SAMPLES_PER_FRAME) * SAMPLES_PER_FRAME
        if waveforms.shape[0] == 0:
            return weight.new_empty(0, window // SAMPLES_PER_FRAME, self.feature_size)
        # The extractor converts any input to a list of NumPy arrays.
        clips: list[np.ndarray] = list(waveforms.detach().float().cpu().numpy())
        mel = self.feature_extractor(
            clips,
            sampling_rate=SAMPLE_RATE,
            padding="max_length",
            max_length=window,
            truncation=False,
            return_tensors="pt",
        )["input_features"]
        with torch.no_grad():
            return self.encoder(mel.to(weight))

    def encode_clips(
        self,
        clips: Sequence[NDArray[np.float32]],
        batch_size: int = 32,
        on_batch: Callable[[int], object] = lambda done: None,
    ) -> tuple[Tensor, Tensor]:
        """Encodes clips of different lengths to one row of features every 40 ms.

        A second of silence is appended to each clip and its rows are dropped, because Whisper
        expects the silence that pads its 30 s window. On 30 synthetic questions its own decoder
        had a word error rate of 68 % without silence, and of 48 % both with one second and with the
        full window. Only clips with equal numbers of rows share a batch, so the features of a clip
        do not depend on other clips.

        Args:
            clips: each `[samples]` at 16 kHz, in -1..1.
            batch_size: number of clips per batch.
            on_batch: called with the number of clips encoded since the last call.

        Returns:
            features `[M, n, width]` float16 on the CPU, zeros after a clip's last row, and lengths
            `[M]` int64, rows of each clip (`ceil(samples / 640)`).

        Raises:
            ValueError: If a clip is not a vector of floats, is empty or longer than 29 s.
        """
        groups: dict[int, list[int]] = defaultdict(list)
        for index, clip in enumerate(clips):
            fits = clip.ndim == 1 and 0 < clip.size <= MAX_SAMPLES - TAIL_SAMPLES
            if not fits or clip.dtype.kind != "f":
                raise ValueError(
                    f"clips[{index}] ({clip.dtype}, shape {list(clip.shape)}) must be floating "
                    f"point of shape [samples] with 1 to "
                    f"{MAX_SAMPLES - TAIL_SAMPLES} samples (29 s at 16 kHz)"
                )
            groups[-(-clip.size // (POOL * SAMPLES_PER_FRAME))].append(index)
        lengths = torch.zeros(len(clips), dtype=torch.int64)
        shape = (len(clips), max(groups, default=0), self.feature_size)
        features = torch.zeros(shape, dtype=torch.float16)
        for rows, members in groups.items():
            window = rows * POOL * SAMPLES_PER_FRAME + TAIL_SAMPLES
            lengths[members] = rows
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                waveforms = np.zeros((len(batch), window), dtype=np.float32)
                for row, index in enumerate(batch):
                    waveforms[row, : clips[index].size] = clips[index]
                frames = self(torch.from_numpy(waveforms))[:, : rows * POOL].float()
                pooled = frames.unflatten(1, (rows, POOL)).mean(dim=2)
                features[batch, :rows] = pooled.to("cpu", torch.float16)
                on_batch(len(batch))
        return features, lengths

    def encode_recordings(
        self, recordings: Sequence[NDArray[np.float32]], max_rows: int = MAX_ROWS
    ) -> list[list[Tensor]]:
        """Encodes several recordings; pieces of equal length share batches."""
        step = max_rows * POOL * SAMPLES_PER_FRAME
        pieces = [
            [samples[start : start + step] for start in range(0, max(samples.size, 1), step)]
            for samples in recordings
        ]
        features, _ = self.encode_clips([piece for own in pieces for piece in own])
        padded = nn.functional.pad(features.float(), (0, 0, 0, max_rows - features.shape[1]))
        rows = iter(padded)
        return [[next(rows) for _ in own] for own in pieces]

    def encode_recording(
        self, samples: NDArray[np.float32], max_rows: int = MAX_ROWS
    ) -> list[Tensor]:
        """Encodes a recording of any length in equal pieces.

        Args:
            samples: `[samples]` at 16 kHz, in -1..1.
            max_rows: number of rows of 40 ms per piece, at most 725 (29 s).

        Returns:
            `[max_rows, width]` float32 of each piece, zeros after the recording's last row.
        """
        return self.encode_recordings([samples], max_rows)[0]
