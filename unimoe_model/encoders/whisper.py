"""Whisper over windows of 30 s, as the paper uses it: 1500 frames each."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from unimoe_model.encoders.published import PublishedEncoder

SAMPLE_RATE = 16_000
_MEL_FRAMES_PER_POSITION = 2


class WhisperWindowEncoder(PublishedEncoder):
    """The frozen encoder of a Whisper model.

    Built with random weights; :meth:`from_folder` loads those of a transformers model.

    Args:
        config: sizes; by default those of Whisper small.
    """

    repository = "openai/whisper-small"
    model_class = WhisperModel
    model_types = ("whisper",)
    sample_rate = SAMPLE_RATE

    def __init__(self, config: WhisperConfig | None = None) -> None:
        config = config or WhisperConfig(
            d_model=768,
            encoder_layers=12,
            encoder_attention_heads=12,
            encoder_ffn_dim=3072,
            num_mel_bins=80,
        )
        super().__init__("Whisper", feature_size=config.d_model)
        self.encoder = WhisperEncoder(config)
        self.feature_extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
        frames = _MEL_FRAMES_PER_POSITION * config.max_source_positions
        self.window_samples = frames * self.feature_extractor.hop_length
        self.freeze()

    def take_modules(self, model: WhisperModel) -> None:
        """Uses the encoder of the model, without its decoder."""
        self.encoder = model.encoder

    def log_mel(self, samples: NDArray[np.float32]) -> Tensor:
        """Log-mel frames of a recording, window by window; the last one is padded with silence.

        Args:
            samples: `[samples]` float32 at 16 kHz, in -1..1.

        Returns:
            `[windows, mel bins, frames]` float32; 80 x 3000 per window of 30 s.

        Raises:
            ValueError: If samples are empty, or have a wrong shape or dtype.
        """
        if samples.ndim != 1 or samples.size == 0 or samples.dtype.kind != "f":
            raise ValueError(
                f"samples ({samples.dtype}, shape {list(samples.shape)}) must be floating point of"
                " shape [n], n > 0"
            )
        starts = range(0, samples.size, self.window_samples)
        windows = [samples[start : start + self.window_samples] for start in starts]
        # One at a time: the extractor would pad a list of windows to a common length.
        return torch.cat(
            [
                self.feature_extractor(
                    window,
                    sampling_rate=SAMPLE_RATE,
                    max_length=self.window_samples,
                    return_tensors="pt",
                )["input_features"]
                for window in windows
            ]
        )

    def forward(self, input_features: Tensor) -> Tensor:
        """Encodes log-mel frames `[B, mel bins, frames]` to `[B, frames / 2, C]`."""
        with torch.no_grad():
            return self.encoder(input_features.to(self.encoder.conv1.weight)).last_hidden_state

    def encode_recording(
        self, samples: NDArray[np.float32], max_rows: int | None = None
    ) -> list[Tensor]:
        """Encodes a recording of any length in windows of 30 s.

        Args:
            samples: `[samples]` float32 at 16 kHz, in -1..1.
            max_rows: maximum rows per window; must be at least the rows of a window, 1500.

        Returns:
            Features `[1500, C]` of each window.

        Raises:
            ValueError: If samples are empty, or have a wrong shape or dtype, or `max_rows` is too
                low.
        """
        rows = self.encoder.config.max_source_positions
        if max_rows is not None and max_rows < rows:
            raise ValueError(f"max_rows ({max_rows}) must be at least {rows}, those of a window")
        return [self(mel[None])[0] for mel in self.log_mel(samples)]
