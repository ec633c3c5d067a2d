"""Runs the experts of transformers' mixture-of-experts models on our operators."""

import inspect
import re

import torch

from unimoe_kernels.integrations.activations import activation_name
from unimoe_kernels.layers.expert_lora import (
    add_lora_of_down,
    add_lora_of_first,
    unmerged_lora,
)
from unimoe_kernels.ops import expert_sort, grouped_mm, moe_mlp, permute, swiglu, unpermute

_NAME = "unimoe"
_MIN_VERSION = (5, 17)
_KNOWN_LAYOUT = (
    "is_concatenated",
    "is_transposed",
    "has_bias",
    "has_gate",
    "has_post_expert_norm",
)
# What else a newer transformers can say of a layout, with its default; set by registering.
_unknown_layout: dict[str, object] = {}
# Experts whose own code computes in float32 whatever dtype their weights have.
_IN_FLOAT32 = ("OpenAIPrivacyFilterExperts",)


def register_with_transformers() -> None:
    """Adds `"unimoe"` to the experts implementations of transformers.

    Afterwards `from_pretrained(..., experts_implementation="unimoe")`,
    `from_config(config, experts_implementation="unimoe")` and
    `model.set_experts_implementation("unimoe")` work for every model whose experts class carries
    transformers' `use_experts_implementation`. Calling it again changes nothing.

    Experts with a plain silu, gelu or relu gate run through `moe_mlp`. All others (an overridden
    gate such as that of gpt-oss, other activations, no gate, a norm after each expert) keep their
    own activation code between two `grouped_mm`. Transposed weights, biases, and the ids of other
    ranks' experts under expert parallelism are understood in both.

    Raises:
        ImportError: if transformers is missing or older than 5.17, which has no such registry.
    """
    try:
        import transformers
        from transformers.integrations.moe import (
            ALL_EXPERTS_FUNCTIONS,
            use_experts_implementation,
        )
    except ImportError as error:
        raise ImportError(
            "register_with_transformers needs transformers: pip install 'transformers>=5.17'"
        ) from error
    # The patch may be such as "0rc1"; major and minor are numbers.
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
    """The forward of an experts module of transformers.

    Args:
        experts: a module of a class decorated with `use_experts_implementation`.
        hidden_states: `[T, D]`.
        top_k_index: `[T, K]`, integer; ids of num_experts or more, as of other ranks' experts,
            are dropped and add 0.
        top_k_weights: `[T, K]`, floating point.

    Returns:
        `[T, D]`, dtype of hidden_states.

    Raises:
        NotImplementedError: if the experts have something that only a newer transformers knows of.
    """
    for name, default in _unknown_layout.items():
        if getattr(experts, name, default) != default:
            raise NotImplementedError(
                f"{type(experts).__name__} has {name}={getattr(experts, name)!r}, unknown "
                "here: run it with experts_implementation='grouped_mm' or 'eager'"
            )
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    first_proj, first_bias = _weight_and_bias(experts, first)
    down_proj, down_bias = _weight_and_bias(experts, "down_proj")
    dtype = down_proj.dtype
    if torch.is_autocast_enabled(hidden_states.device.type) and dtype != torch.float64:
        # A linear layer would have run in this dtype, and so do the operators that multiply.
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
    elif type(experts).__name__ in _IN_FLOAT32:
        dtype = torch.promote_types(dtype, torch.float32)
    operands = (hidden_states, first_proj, first_bias, down_proj, down_bias)
    x_TD, first_proj, first_bias, down_proj, down_bias = (
        operand if operand is None else operand.to(dtype) for operand in operands
    )
    scores_TK = top_k_weights.to(torch.float64 if dtype == torch.float64 else torch.float32)

    activation = plain_gate(experts)
    lora = unmerged_lora(experts)
    if activation is not None and lora is None:
        y_TD = moe_mlp(
            x_TD,
            first_proj,
            down_proj,
            top_k_index,
            scores_TK,
            activation=activation,
            gate_up_bias=first_bias,
            down_bias=down_bias,
        )
        return y_TD.to(hidden_states.dtype)

    top_k = top_k_index.shape[-1]
    sort = expert_sort(top_k_index, first_proj.shape[0])
    rows_ND = permute(x_TD, sort, top_k)
    hidden = grouped_mm(rows_ND, first_proj, sort.expert_offsets, first_bias)
    hidden = add_lora_of_first(lora, hidden, rows_ND, sort.expert_offsets)
    if activation is not None:
        act_NF = swiglu(hidden, activation)
    else:
        # Code of the model runs in the model's dtype, which under autocast is the wider one.
        hidden = hidden.to(torch.promote_types(dtype, hidden_states.dtype))
        act_NF = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    act_NF = act_NF.to(dtype)
    out_ND = grouped_mm(act_NF, down_proj, sort.expert_offsets, down_bias)
    out_ND = add_lora_of_down(lora, out_ND, act_NF, sort.expert_offsets)
    if _has_post_expert_norm(experts):
        out_ND = experts.post_expert_norm(out_ND)
    return unpermute(out_ND, sort, top_k, scores_TK).to(hidden_states.dtype)


def _weight_and_bias(
    experts: torch.nn.Module, name: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A stacked weight as `[E, out, in]`, a view where it is stored transposed, and its bias."""
    weight = getattr(experts, name)
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    return (weight.transpose(1, 2) if experts.is_transposed else weight), bias


def _has_post_expert_norm(experts: torch.nn.Module) -> bool:
    """Whether a norm follows each expert; transformers 5.17 does not know of it."""
    return getattr(experts, "has_post_expert_norm", False)


def plain_gate(experts: torch.nn.Module) -> str | None:
    """The activation name of `moe_mlp` that equals this module's gate, or None if none does."""
    from transformers.integrations.moe import ExpertsInterface

    if not experts.has_gate or _has_post_expert_norm(experts):
        return None
    # The default gate is defined beside the registry; an overridden one in the model's own module.
    if type(experts)._apply_gate.__module__ != ExpertsInterface.__module__:
        return None
    return activation_name(experts.act_fn)
