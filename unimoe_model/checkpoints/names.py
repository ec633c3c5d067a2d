"""Maps parameter names of published checkpoints to names of this package, and back."""

import re
from dataclasses import dataclass

LLM = "model.language_model."
DECODER_LAYERS = f"{LLM}layers."
PROJECTIONS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
"""Matrices of an expert in each stacked weight, by the last part of the weight's name."""
_LAYER = r"model\.layers\.(\d+)\."
_DEEPSPEED = r"deepspeed_moe\.experts\.deepspeed_"
_EXPERT = re.compile(rf"{_LAYER}mlp\.(?:{_DEEPSPEED})?experts\.(\d+)\.(gate|up|down)_proj\.weight")
_ROUTER = re.compile(rf"{_LAYER}mlp\.(?:deepspeed_moe\.gate\.wg|gate)\.weight")
_PLAIN = re.compile(
    rf"{_LAYER}((?:input|post_attention)_layernorm|self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
    r"\.weight"
)
_PREFIXES = (
    ("lm_head.weight", "lm_head.weight"),
    ("model.embed_tokens.", f"{LLM}embed_tokens."),
    ("model.norm.", f"{LLM}norm."),
    ("model.layers.", f"{LLM}layers."),
    ("model.query_tokens", "model.speech_connector.query_tokens"),
    ("model.mm_projector.", "model.image_connector.projector."),
    ("model.mm_audio_aligner.projector.", "model.{hears}_connector.projector."),
    ("model.mm_audio_aligner.query_tokens", "model.audio_connector.query_tokens"),
    ("model.mm_audio_aligner.decoder.audio_decoder.", "model.speech_connector.decoder."),
    ("model.mm_audio_aligner.qformer.qformer.", "model.audio_connector.qformer."),
)
_ASIDE = (
    (re.compile(rf"{_LAYER}self_attn\.rotary_emb\.inv_freq"), "computed from the configuration"),
    (re.compile(r"model\.(vision|audio)_tower\..*"), "weights of a frozen encoder"),
    (
        re.compile(r"model\.mm_audio_aligner\.decoder\.audio_decoder\.embed_tokens\.weight"),
        "token embedding of a decoder that is never given tokens",
    ),
)
LORA = re.compile(r"(.*_proj)_lora_([AB])(\.weight)")
"""Names of LoRA weights inside the experts of the eight-expert code."""


@dataclass(frozen=True)
class Part:
    """The parameter that a published tensor is, or is part of.

    Attributes:
        target: name of the parameter, which stacks the matrices of all experts for expert weights.
        expert: number of the expert; None for other tensors.
        projection: `"gate"`, `"up"` or `"down"` for experts; None for other tensors.
    """

    target: str
    expert: int | None = None
    projection: str | None = None


def own_part(name: str, hears: str) -> Part | None:
    """The parameter of a published tensor, or None for an unknown name.

    Args:
        name: published name.
        hears: kind of sound of the checkpoint's aligner, `"speech"` or `"audio"`. Published names
            of the projector are the same for both.
    """
    if expert := _EXPERT.fullmatch(name):
        layer, number, projection = expert.groups()
        stack = "down_proj" if projection == "down" else "gate_up_proj"
        return Part(f"{LLM}layers.{layer}.mlp.experts.{stack}", int(number), projection)
    if router := _ROUTER.fullmatch(name):
        return Part(f"{LLM}layers.{router[1]}.mlp.router.weight")
    for published, own in _PREFIXES:
        if name.startswith(published) and _is_known(name):
            return Part(own.format(hears=hears) + name.removeprefix(published))
    return None


def aside_reason(name: str) -> str | None:
    """Why a published tensor is not a parameter of the model, or None if it is one."""
    return next((reason for pattern, reason in _ASIDE if pattern.fullmatch(name)), None)


def published_name(own: str, hears: str, eight: bool) -> str | None:
    """The published name of a parameter outside the experts, or None if it has none.

    Args:
        own: name of the parameter in this package.
        hears: kind of sound of the checkpoint's aligner, `"speech"` or `"audio"`.
        eight: whether to use the names of the eight-expert code for routers.
    """
    gate = "deepspeed_moe.gate.wg" if eight else "gate"
    own = own.replace(".mlp.router.", f".mlp.{gate}.")
    for published, prefix in _PREFIXES:
        prefix = prefix.format(hears=hears)
        name = published + own.removeprefix(prefix)
        if own.startswith(prefix) and _is_known(name):
            return name
    return None


def _is_known(name: str) -> bool:
    """Whether a published name outside the experts is known, or does not belong to a layer."""
    in_layer = name.startswith("model.layers.")
    return not in_layer or bool(_PLAIN.fullmatch(name) or _ROUTER.fullmatch(name))


def published_expert(own: str, expert: int, projection: str, eight: bool) -> str:
    """The published name of one matrix of a stacked expert weight."""
    layer = re.match(rf"{re.escape(LLM)}layers\.(\d+)\.", own)[1]
    folder = "deepspeed_moe.experts.deepspeed_experts" if eight else "experts"
    return f"model.layers.{layer}.mlp.{folder}.{expert}.{projection}_proj.weight"
