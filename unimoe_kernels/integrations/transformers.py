"""The experts implementation `"unimoe"` of transformers' mixture-of-experts models."""

import inspect
import re

import torch

from unimoe_kernels.integrations.activations import activation_name
from unimoe_kernels.layers._inputs import weight_of
from unimoe_kernels.layers.expert_lora import unmerged_lora
from unimoe_kernels.layers.quantized_projection import QuantizedProjection
from unimoe_kernels.ops import ExpertWeights, run_experts
from unimoe_kernels.quantization.weight import QuantizedWeight

_NAME = "unimoe"
_REGISTRY = "transformers.integrations.moe"
_MIN_VERSION = (5, 17)
_KNOWN_LAYOUT = (
    "is_concatenated",
    "is_transposed",
    "has_bias",
    "has_gate",
    "has_post_expert_norm",
)
# Further layout options of newer transformers versions, with their defaults; set on registration.
_unknown_layout: dict[str, object] = {}
# Experts whose own code computes in float32 for weights of any dtype.
_IN_FLOAT32 = ("OpenAIPrivacyFilterExperts",)


def register_with_transformers() -> None:
    """Adds `"unimoe"` to the experts implementations of transformers.

    Afterwards `from_pretrained(..., experts_implementation="unimoe")`,
    `from_config(config, experts_implementation="unimoe")` and
    `model.set_experts_implementation("unimoe")` work for every model whose experts class is
    decorated with transformers' `use_experts_implementation`. Calling it again has no effect.

    Experts with a plain silu, gelu or relu gate run in `moe_mlp`. All others (an overridden gate
    such as that of gpt-oss, other activations, no gate, a norm after each expert) keep their own
    activation code between two calls of `grouped_mm`. Both support transposed weights, biases and,
    under expert parallelism, ids of other ranks' experts.

    Raises:
        ImportError: If transformers is not installed or older than 5.17, which has no registry.
    """
    try:
        import transformers
        from transformers.integrations.moe import (
            ALL_EXPERTS_FUNCTIONS,
            use_experts_implementation,
        )
    except ImportError as error:
        raise ImportError(
            "register_with_transformers requires transformers: pip install 'transformers>=5.17'"
        ) from error
    # The patch version may be, for example, "0rc1"; major and minor are numbers.
    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    if version < _MIN_VERSION:
        raise ImportError(f"transformers is {transformers.__version__}, it must be at least 5.17")
    _unknown_layout.clear()
    for name, option in inspect.signature(use_experts_implementation).parameters.items():
        if name not in ("experts_class", "experts_interface", *_KNOWN_LAYOUT):
            _unknown_layout[name] = option.default
    ALL_EXPERTS_FUNCTIONS.register(_NAME, unimoe_experts_forward)


def unimoe_experts_forward(
    experts: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Forward of an experts module of transformers.

    Args:
        experts: a module of a class decorated with `use_experts_implementation`.
        hidden_states: `[T, D]`.
        top_k_index: `[T, K]`, integer; ids of num_experts or more, such as those of other ranks'
            experts, are dropped and add 0.
        top_k_weights: `[T, K]`, floating point.

    Returns:
        `[T, D]`, dtype of hidden_states.

    Raises:
        NotImplementedError: If the experts have an option that this version does not support.
    """
    for name, default in _unknown_layout.items():
        if getattr(experts, name, default) != default:
            raise NotImplementedError(
                f"{type(experts).__name__} has {name}={getattr(experts, name)!r}, which is not "
                "supported: use experts_implementation='grouped_mm' or 'eager'"
            )
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    first_proj, first_bias = _weight_and_bias(experts, first)
    down_proj, down_bias = _weight_and_bias(experts, "down_proj")
    # Quantised weights do not determine the compute dtype.
    quantized = isinstance(down_proj, QuantizedWeight)
    dtype = hidden_states.dtype if quantized else down_proj.dtype
    if torch.is_autocast_enabled(hidden_states.device.type) and dtype != torch.float64:
        # Linear layers would run in this dtype, and so do the matmul operators.
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
    elif type(experts).__name__ in _IN_FLOAT32:
        dtype = torch.promote_types(dtype, torch.float32)
    operands = (first_proj, down_proj, first_bias, down_bias)
    weights = ExpertWeights(*[_in_dtype(one, dtype) for one in operands])

    def own_activation(hidden: torch.Tensor) -> torch.Tensor:
        # The model's own code runs in the model's dtype, which is wider under autocast.
        hidden = hidden.to(torch.promote_types(dtype, hidden_states.dtype))
        return experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)

    lora, has_norm = unmerged_lora(experts), _has_post_expert_norm(experts)

    def correct_down(
        out: torch.Tensor, rows: torch.Tensor, expert_offsets: torch.Tensor
    ) -> torch.Tensor:
        if lora is not None:
            out = lora.correct_down(out, rows, expert_offsets)
        return experts.post_expert_norm(out) if has_norm else out

    y_TD = run_experts(
        _in_dtype(hidden_states, dtype),
        top_k_index,
        top_k_weights,
        weights,
        plain_gate(experts) or own_activation,
        correct_first=None if lora is None else lora.correct_first,
        correct_down=correct_down if lora is not None or has_norm else None,
    )
    return _in_dtype(y_TD, hidden_states.dtype)


def _in_dtype(
    tensor: torch.Tensor | QuantizedWeight | None, dtype: torch.dtype
) -> torch.Tensor | QuantizedWeight | None:
    if tensor is None or isinstance(tensor, QuantizedWeight):
        return tensor
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _weight_and_bias(
    experts: torch.nn.Module, name: str
) -> tuple[torch.Tensor | QuantizedWeight, torch.Tensor | None]:
    """Returns a stacked weight `[E, out, in]`, a view if stored transposed, and its bias."""
    weight = weight_of(experts, name)
    bias = weight_of(experts, f"{name}_bias") if experts.has_bias else None
    if isinstance(weight, QuantizedProjection):  # never stored transposed
        return weight.weight, bias
    return (weight.transpose(1, 2) if experts.is_transposed else weight), bias


def _has_post_expert_norm(experts: torch.nn.Module) -> bool:
    """Returns whether a norm follows each expert; transformers 5.17 has no such option."""
    return getattr(experts, "has_post_expert_norm", False)


def plain_gate(experts: torch.nn.Module) -> str | None:
    """Returns the `moe_mlp` activation that equals this module's gate, or None if there is none."""
    if not experts.has_gate or _has_post_expert_norm(experts):
        return None
    # The default gate is defined beside the registry; an overridden one in the model's own module.
    if type(experts)._apply_gate.__module__ != _REGISTRY:
        return None
    return activation_name(experts.act_fn)
