"""The dense model that training starts from: its configuration, and a wider FFN."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from unimoe_model.configuration import MEDIA_KINDS, UniMoEConfig
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.training.settings import ModelSettings

_DECODER_FIELDS = (
    "d_model",
    "decoder_layers",
    "decoder_attention_heads",
    "decoder_ffn_dim",
    "max_target_positions",
)


def dense_config(
    model: ModelSettings,
    text: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    speech_decoder: nn.Module,
) -> UniMoEConfig:
    """Configuration of a dense Uni-MoE over the demo's encoders.

    Args:
        model: sizes of the connectors.
        text: fields of `LlamaConfig`.
        tokenizer: the LLM's, with the media placeholders.
        speech_decoder: Whisper decoder whose sizes the speech connector has.
    """
    ids = tokenizer.convert_tokens_to_ids
    decoder = speech_decoder.config
    return UniMoEConfig(
        text_config={
            **text,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": True,
        },
        tie_word_embeddings=True,
        num_experts=0,
        vision_encoder="efficientnet-lite0",
        vision_feature_size=1280,
        vision_num_tokens=9,
        speech_encoder="whisper-tiny.en",
        speech_feature_size=decoder.d_model,
        speech_max_frames=model.speech_max_frames,
        speech_num_queries=model.speech_num_queries,
        speech_connector={name: getattr(decoder, name) for name in _DECODER_FIELDS},
        audio_encoder="aisfx",
        audio_feature_size=512,
        audio_num_queries=model.audio_num_queries,
        audio_connector=model.audio_connector,
        media_token_ids={kind: ids(f"<{kind}>") for kind in MEDIA_KINDS},
    )


@torch.no_grad()
def widen_ffns(model: UniMoEForConditionalGeneration, times: int) -> UniMoEForConditionalGeneration:
    """A dense model whose FFNs are `times` as wide and which outputs the same.

    Every FFN stands `times` side by side, each copy's output divided by `times`. The copies of a
    unit stay alike until something that tells them apart is trained, such as LoRA on `down_proj`.

    Args:
        model: dense model; it is left as it is.
        times: at least 1.

    Returns:
        A new model on the same device, in the same dtype.

    Raises:
        ValueError: If `times` is below 1, or the model has MoE layers.

    Reference: Chen et al., "Net2Net", arXiv 1511.05641.
    """
    if times < 1:
        raise ValueError(f"times ({times}) must be at least 1")
    if model.config.num_experts:
        raise ValueError(f"model has num_experts ({model.config.num_experts}), expected 0")
    fields = model.config.to_dict()
    fields["text_config"]["intermediate_size"] *= times
    wide = UniMoEForConditionalGeneration(UniMoEConfig.from_dict(fields))
    state = model.state_dict()
    for index in range(len(model.model.language_model.layers)):
        prefix = f"model.language_model.layers.{index}.mlp."
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            weight = state[f"{prefix}{name}.weight"]
            if name == "down_proj":
                weight = weight / times
            state[f"{prefix}{name}.weight"] = torch.cat([weight] * times, dim)
    wide.load_state_dict(state)
    return wide.to(model.device, model.dtype)
