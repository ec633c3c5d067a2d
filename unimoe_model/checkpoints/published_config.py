"""Builds a `UniMoEConfig` from the configuration of a published checkpoint."""

from collections.abc import Mapping

from torch import Tensor
from transformers import LlamaConfig

from unimoe_model.configuration import PLACEMENTS, UniMoEConfig
from unimoe_model.encoders import ENCODERS
from unimoe_model.value_types import fits_type

_TEXT = (
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "bos_token_id",
    "pad_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
_HEAD_WIDTH = 64
"""Width of an attention head in every Whisper, and in the Q-Former of BLIP-2."""
_NAMED = {"BEATs_iter3_plus_AS2M.pt": "beats-iter3-plus-as2m"}


def config_from_published(
    published: Mapping, tensors: Mapping[str, Tensor], hears: str, **overrides
) -> UniMoEConfig:
    """The configuration of a published checkpoint.

    Fields that its `config.json` lacks are inferred from the shapes of its tensors.

    Args:
        published: contents of `config.json`.
        tensors: tensors of the checkpoint by published name, on any device.
        hears: kind of sound of the checkpoint's aligner, `"speech"` or `"audio"`.
        **overrides: fields of `UniMoEConfig` that replace those of the checkpoint.

    Raises:
        ValueError: If a field of the LLM is missing, an override is not a field or has a wrong
            type, or fields contradict each other.
    """
    _check_overrides(overrides)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        _field(published, name)
    text = {name: published[name] for name in _TEXT if published.get(name) is not None}
    fields = {"text_config": LlamaConfig(**text), **_experts(published, tensors, hears)}
    vision = published.get("mm_vision_tower")
    if vision:
        fields["vision_encoder"] = _encoder(vision)
    if published.get("mm_hidden_size"):
        fields["vision_feature_size"] = published["mm_hidden_size"]
    positions = _shape(tensors, "vision_tower.", "position_embedding.weight")
    if positions:
        fields["vision_num_tokens"] = positions[0] - 1
    if published.get("mm_audio_tower"):
        fields[f"{hears}_encoder"] = _encoder(published["mm_audio_tower"])
        fields[f"{hears}_feature_size"] = _field(published, "mm_audio_hidden_size")
        fields[f"{hears}_num_queries"] = _field(published, "query_tokens_size")
        fields[f"{hears}_connector"] = (_decoder if hears == "speech" else _qformer)(tensors)
    return UniMoEConfig(**(fields | overrides))


def _check_overrides(overrides: Mapping) -> None:
    known = {k: v for k, v in UniMoEConfig.__annotations__.items() if k != "sub_configs"}
    for name, value in overrides.items():
        if name not in known:
            raise ValueError(
                f"field {name} (set to {value!r}) must be one of UniMoEConfig: {sorted(known)}"
            )
        if not fits_type(value, known[name]):
            expected = getattr(known[name], "__name__", str(known[name]))
            raise ValueError(f"field {name} (set to {value!r}) must be of type {expected}")


def _experts(published: Mapping, tensors: Mapping, hears: str) -> dict:
    gates = (".mlp.gate.weight", ".deepspeed_moe.gate.wg.weight")
    layers = sorted(int(name.split(".")[2]) for name in tensors if name.endswith(gates))
    if not layers:
        return {"num_experts": 0}
    fields = {
        "num_experts": _field(published, "num_experts"),
        "num_experts_per_tok": _field(published, "num_experts_per_tok"),
        "moe_layers": _placement(layers, published["num_hidden_layers"]),
    }
    if any("deepspeed_moe" in name for name in tensors):
        fields["moe_options"] = {"balance": "first"}
        fields["modality_gate"] = bool(published.get("use_fm_block"))
    coefficients = {
        "aux_balance_loss": "load_balancing_coef",
        "aux_multimodal_loss": "modality_expert_coef",
        "aux_kl_loss": "modality_kl_coef",
    }
    for name, own in coefficients.items():
        if published.get(name):
            fields[own] = _field(published, f"{name}_coef")
    experts = {
        kind: published[f"{name}_expert_indices"]
        for kind, name in (("image", "image"), ("video", "video"), (hears, "audio"))
        if published.get(f"{name}_expert_indices")
    }
    return fields | ({"modality_experts": experts} if experts else {})


def _field(published: Mapping, name: str):
    if published.get(name) is None:
        raise ValueError(f"config.json must have {name}")
    return published[name]


def _placement(layers: list[int], depth: int) -> str | list[int]:
    for name, holds in PLACEMENTS.items():
        if layers == [layer for layer in range(depth) if holds(layer, depth)]:
            return name
    return layers


def _encoder(tower: str) -> str:
    """The name of an encoder in `ENCODERS`, or the checkpoint's own name for others."""
    last = tower.replace("\\\\", "/").rstrip("/").rsplit("/", 1)[-1]
    return last if last in ENCODERS else _NAMED.get(last, tower)


def _shape(tensors: Mapping, *parts: str) -> tuple[int, ...] | None:
    found = (tensor.shape for n, tensor in tensors.items() if all(part in n for part in parts))
    return next(found, None)


def _layers(tensors: Mapping, mark: str) -> int:
    numbers = {n.split(mark, 1)[1].split(".")[0] for n in tensors if mark in n}
    return len(numbers)


def _decoder(tensors: Mapping) -> dict:
    positions = _shape(tensors, "audio_decoder.embed_positions")
    inner = _shape(tensors, "audio_decoder.layers.0.fc1.weight")
    if not positions or not inner:
        return {}
    return {
        "d_model": positions[1],
        "max_target_positions": positions[0],
        "decoder_layers": _layers(tensors, "audio_decoder.layers."),
        "decoder_ffn_dim": inner[0],
        "decoder_attention_heads": max(1, positions[1] // _HEAD_WIDTH),
    }


def _qformer(tensors: Mapping) -> dict:
    inner = _shape(tensors, "qformer.encoder.layer.0.intermediate_query.dense.weight")
    if not inner:
        return {}
    mark = "qformer.encoder.layer."
    crossing = {n.split(mark, 1)[1].split(".")[0] for n in tensors if ".crossattention." in n}
    layers = _layers(tensors, mark)
    return {
        "hidden_size": inner[1],
        "intermediate_size": inner[0],
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, inner[1] // _HEAD_WIDTH),
        "cross_attention_frequency": -(-layers // max(1, len(crossing))),
    }
