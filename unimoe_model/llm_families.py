"""Decoder-only LLMs of transformers that Uni-MoE supports."""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

DENSE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma3_text")
"""Model types whose FFNs can become experts.

A decoder layer is `attention(norm(x))` and `mlp(norm(x))` around residuals, with a second norm
behind each in the Gemmas, and `mlp` is `down_proj(act(gate_proj(x)) * up_proj(x))`. A family whose
layers and head compute nothing else is added here; `tests/model/test_llm_families.py` then compares
it with transformers.
"""
SPARSE_FAMILIES = ("mixtral", "olmoe", "qwen3_moe")
"""Model types with experts of their own, which are kept; only connectors are added."""
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
# Fields that change what a layer or the head computes, with their neutral values.
_NEUTRAL = {"mlp_bias": (False,), "final_logit_softcapping": (None, 0.0)}


def llm_config(config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig:
    """Returns the configuration of an LLM after checking that it is supported.

    Args:
        config: a configuration, or its fields as a dict (`model_type` defaults to `"llama"`).

    Raises:
        ValueError: If the model type or an option is not supported.
    """
    if not isinstance(config, PreTrainedConfig):
        fields = dict(config or {})
        kind = fields.pop("model_type", "llama")
        _check_family(kind)
        config = CONFIG_MAPPING[kind](**fields)
    _check_family(config.model_type)
    for name, neutral in _NEUTRAL.items():
        value = getattr(config, name, neutral[0])
        if value not in neutral:
            raise ValueError(
                f"text_config.{name} ({value!r}) must be {neutral[0]!r}: {config.model_type} with"
                " it computes what a Uni-MoE does not"
            )
    return config


def has_own_experts(config: PreTrainedConfig) -> bool:
    """Whether an LLM has experts of its own."""
    return config.model_type in SPARSE_FAMILIES


def expert_activation(config: PreTrainedConfig) -> str:
    """The `activation` of `unimoe_kernels.MoE` that equals the activation of an LLM's FFNs.

    Raises:
        ValueError: If `MoE` does not support it.
    """
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"text_config.hidden_act ({name!r}) must be one of {tuple(_ACTIVATIONS)} where FFNs"
            " become experts"
        )
    return _ACTIVATIONS[name]


def _check_family(kind: str) -> None:
    known = (*DENSE_FAMILIES, *SPARSE_FAMILIES)
    if kind not in known:
        raise ValueError(f"text_config.model_type ({kind!r}) must be one of {', '.join(known)}")
