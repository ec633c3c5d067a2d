"""What published checkpoints call the parts of a model, and what they are called here."""

import re
from dataclasses import dataclass

LLM = "model.language_model."
_LAYER = r"model\.layers\.(\d+)\."
_DEEPSPEED = r"deepspeed_moe\.experts\.deepspeed_"
_EXPERT = re.compile(rf"{_LAYER}mlp\.(?:{_DEEPSPEED})?experts\.(\d+)\.(gate|up|down)_proj\.weight")
_ROUTER = re.compile(rf"{_LAYER}mlp\.(?:deepspeed_moe\.gate\.wg|gate)\.weight")
_PLAIN = re.compile(
    rf"{_LAYER}((?:input|post_attention)_layernorm|self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
    r"\.weight"
)
_PREFIXES = (
    ("model.mm_projector.", "model.image_connector.projector."),
    ("model.mm_audio_aligner.decoder.audio_decoder.", "model.speech_connector.decoder."),
    ("model.mm_audio_aligner.qformer.qformer.", "model.audio_connector.qformer."),
)
_WHOLE = {
    "lm_head.weight": "lm_head.weight",
    "model.embed_tokens.weight": f"{LLM}embed_tokens.weight",
    "model.norm.weight": f"{LLM}norm.weight",
    "model.query_tokens": "model.speech_connector.query_tokens",
    "model.mm_audio_aligner.query_tokens": "model.audio_connector.query_tokens",
}
_ALIGNER_PROJECTOR = "model.mm_audio_aligner.projector."
_ASIDE = (
    (re.compile(rf"{_LAYER}self_attn\.rotary_emb\.inv_freq"), "computed from the configuration"),
    (re.compile(r"model\.(vision|audio)_tower\..*"), "weights of a frozen encoder"),
    (
        re.compile(r"model\.mm_audio_aligner\.decoder\.audio_decoder\.embed_tokens\.weight"),
        "token embedding of a decoder that is never given tokens",
    ),
)
LORA = re.compile(r"(.*_proj)_lora_([AB])(\.weight)")
"""Names of the LoRA that the eight-expert code keeps in its experts."""


@dataclass(frozen=True)
class Part:
    """Where a published tensor goes.

    Attributes:
        target: name here, or of the stack of experts that it is part of.
        expert: number of the expert, or None.
        projection: `"gate"`, `"up"` or `"down"` of an expert, or None.
    """

    target: str
    expert: int | None = None
    projection: str | None = None


def own_part(name: str, hears: str) -> Part | None:
    """Where a published tensor goes, or None for an unknown name.

    Args:
        name: published name.
        hears: `"speech"` or `"audio"`: which of the two the checkpoint's aligner is for. Both call
            its projector the same.
    """
    expert = _EXPERT.fullmatch(name)
    if expert:
        layer, number, projection = expert.groups()
        stack = "down_proj" if projection == "down" else "gate_up_proj"
        return Part(f"{LLM}layers.{layer}.mlp.experts.{stack}", int(number), projection)
    router = _ROUTER.fullmatch(name)
    if router:
        return Part(f"{LLM}layers.{router[1]}.mlp.router.weight")
    if name in _WHOLE:
        return Part(_WHOLE[name])
    if _PLAIN.fullmatch(name):
        return Part(LLM + name.removeprefix("model."))
    if name.startswith(_ALIGNER_PROJECTOR):
        return Part(f"model.{hears}_connector.projector.{name.removeprefix(_ALIGNER_PROJECTOR)}")
    for published, own in _PREFIXES:
        if name.startswith(published):
            return Part(own + name.removeprefix(published))
    return None


def aside_reason(name: str) -> str | None:
    """Why a published tensor has no place in the model, or None if it has."""
    return next((reason for pattern, reason in _ASIDE if pattern.fullmatch(name)), None)


def published_name(own: str, hears: str, eight: bool) -> str | None:
    """The published name of a parameter that is no stack of experts, or None if it has none.

    Args:
        own: name here.
        hears: see `own_part`.
        eight: whether routers are called as in the eight-expert code.
    """
    router = re.fullmatch(rf"{re.escape(LLM)}layers\.(\d+)\.mlp\.router\.weight", own)
    if router:
        gate = "deepspeed_moe.gate.wg" if eight else "gate"
        return f"model.layers.{router[1]}.mlp.{gate}.weight"
    for published, name in _WHOLE.items():
        if name == own:
            return published
    projector = f"model.{hears}_connector.projector."
    if own.startswith(projector):
        return _ALIGNER_PROJECTOR + own.removeprefix(projector)
    for published, prefix in _PREFIXES:
        if own.startswith(prefix):
            return published + own.removeprefix(prefix)
    plain = "model." + own.removeprefix(LLM)
    return plain if own.startswith(LLM) and _PLAIN.fullmatch(plain) else None


def published_expert(own: str, expert: int, projection: str, eight: bool) -> str:
    """The published name of one matrix of a stack of experts."""
    layer = re.match(rf"{re.escape(LLM)}layers\.(\d+)\.", own)[1]
    folder = "deepspeed_moe.experts.deepspeed_experts" if eight else "experts"
    return f"model.layers.{layer}.mlp.{folder}.{expert}.{projection}_proj.weight"
