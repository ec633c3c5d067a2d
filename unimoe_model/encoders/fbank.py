"""Kaldi's log-mel filter bank, as BEATs expects it."""

import functools
import warnings

import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

SAMPLE_RATE = 16_000
MEL_BANDS = 128
FRAME = 400  # 25 ms
SHIFT = 160  # 10 ms
_FFT = 512
_PREEMPHASIS = 0.97
# Statistics of log-mel values over AudioSet.
_MEAN, _STD = 15.41663, 6.55582


def num_frames(samples: int) -> int:
    """Number of complete frames of a clip."""
    return max(0, 1 + (samples - FRAME) // SHIFT)


def beats_fbank(waveforms: Tensor) -> Tensor:
    """Normalised log-mel frames of sound.

    Args:
        waveforms: `[B, samples]` floating point at 16 kHz, full scale 1.

    Returns:
        `[B, num_frames(samples), 128]`, float64 for float64 waveforms, else float32:
        `(log mel power - 15.41663) / (2 * 6.55582)` of the waveform times 2**15.

    Reference:
        `compute-fbank-feats` of Kaldi with dither 0; BEATs, arXiv 2212.09058.
    """
    dtype = torch.float64 if waveforms.dtype == torch.float64 else torch.float32
    window, filters = (table.to(waveforms.device, dtype) for table in _tables())
    if waveforms.shape[-1] < FRAME:
        return waveforms.new_zeros(waveforms.shape[0], 0, MEL_BANDS, dtype=dtype)
    frames = waveforms.to(dtype).mul(2**15).unfold(-1, FRAME, SHIFT)
    frames = frames - frames.mean(-1, keepdim=True)
    # The first sample of a frame has itself as predecessor.
    before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    spectrum = torch.fft.rfft((frames - _PREEMPHASIS * before) * window, _FFT)
    power = spectrum.real.square() + spectrum.imag.square()
    mel = (power @ filters).clamp(min=torch.finfo(torch.float32).eps)
    return (mel.log() - _MEAN) / (2 * _STD)


@functools.cache
def _tables() -> tuple[Tensor, Tensor]:
    """The Povey window `[400]` and the mel filters `[257, 128]`, float64."""
    window = torch.hann_window(FRAME, periodic=False, dtype=torch.float64) ** 0.85
    with warnings.catch_warnings():
        # The lowest bands are narrower than a bin, so that some are empty, in Kaldi as well.
        warnings.filterwarnings("ignore", "At least one mel filter has all zero values")
        filters = mel_filter_bank(
            num_frequency_bins=_FFT // 2 + 1,
            num_mel_filters=MEL_BANDS,
            min_frequency=20,
            max_frequency=SAMPLE_RATE // 2,
            sampling_rate=SAMPLE_RATE,
            norm=None,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )
    return window, torch.from_numpy(filters)
