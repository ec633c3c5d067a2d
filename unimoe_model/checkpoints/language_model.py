"""The LLM of the published four-expert checkpoints, under its names there and here."""

import re
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

from unimoe_kernels import stack_experts, unstack_experts

_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.)experts\.(\d+)\.(\w+\.weight)")
_STACKED = re.compile(r"(model\.layers\.\d+\.mlp\.)experts\.gate_up_proj")
_OURS = "model.language_model."
# Computed anew from the configuration.
_DROPPED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_KNOWN = re.compile(
    r"lm_head\.weight|model\.(embed_tokens|norm)\.weight|model\.layers\.\d+\."
    r"((input|post_attention)_layernorm|self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|mlp\.gate)"
    r"\.weight"
)


def from_published(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `UniMoEForConditionalGeneration`'s LLM and head from a published one.

    Args:
        published: weights of the LLM by their published names; experts are separate FFNs there.

    Returns:
        The same numbers under our names, experts stacked.

    Raises:
        ValueError: if a name is unknown, or an expert or one of its weights is missing or of
            another shape.
    """
    state, ffns = {}, defaultdict(dict)
    for name, tensor in published.items():
        expert = _EXPERT.fullmatch(name)
        if expert:
            mlp, index, key = expert.groups()
            ffns[mlp].setdefault(int(index), {})[key] = tensor
        elif not _DROPPED.fullmatch(name):
            if not _KNOWN.fullmatch(name):
                raise ValueError(f"{name} is no weight of the published LLM")
            state[_own_name(name)] = tensor
    for mlp, experts in ffns.items():
        if sorted(experts) != list(range(len(experts))):
            raise ValueError(f"{mlp}experts has the experts {sorted(experts)}, one is missing")
        try:
            stacked = stack_experts([experts[index] for index in range(len(experts))])
        except ValueError as error:
            raise ValueError(f"{mlp}experts: {error}") from error
        for key, tensor in zip(("gate_up_proj", "down_proj"), stacked, strict=True):
            state[_own_name(f"{mlp}experts.{key}")] = tensor
    return state


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `from_published` came from, bit for bit, without what it drops.

    Args:
        state: weights of the LLM and its head under our names.

    Raises:
        ValueError: if a name is unknown.
    """
    names = {_published_name(name): tensor for name, tensor in state.items()}
    published = {}
    for name, tensor in names.items():
        stacked = _STACKED.fullmatch(name)
        if stacked:
            mlp = stacked[1]
            ffns = unstack_experts(tensor, names[f"{mlp}experts.down_proj"])
            for index, ffn in enumerate(ffns):
                published |= {f"{mlp}experts.{index}.{key}": value for key, value in ffn.items()}
        elif not name.endswith(".experts.down_proj"):
            if not _KNOWN.fullmatch(name):
                raise ValueError(f"{name} is no weight of the LLM")
            published[name] = tensor
    return published


def _own_name(name: str) -> str:
    name = re.sub(r"\.mlp\.gate\.", ".mlp.router.", name)
    return _OURS + name.removeprefix("model.") if name.startswith("model.") else name


def _published_name(name: str) -> str:
    name = re.sub(r"\.mlp\.router\.", ".mlp.gate.", name)
    return "model." + name.removeprefix(_OURS) if name.startswith(_OURS) else name
