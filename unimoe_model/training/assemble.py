"""Assembly of MoE models from dense ones, and merging of LoRA."""

from collections.abc import Iterator, Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from unimoe_kernels import GroupedExperts, MoE, merge_and_unload_expert_lora
from unimoe_model.configuration import UniMoEConfig
from unimoe_model.modeling import UniMoEForConditionalGeneration

FFN_NAMES = ("gate_proj", "up_proj", "down_proj")


def ffn_state(model: UniMoEForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Copies the dense FFN weights of every layer, by `<layer>.<gate|up|down>_proj.weight`."""
    return {
        f"{index}.{name}.weight": getattr(layer.mlp, name).weight.detach().clone()
        for index, layer in enumerate(model.model.language_model.layers)
        for name in FFN_NAMES
    }


def assemble_moe(
    dense: UniMoEForConditionalGeneration,
    experts: Mapping[str, Mapping[str, torch.Tensor]],
    top_k: int,
    **moe_fields,
) -> UniMoEForConditionalGeneration:
    """Builds an MoE model from a dense model and the FFNs of its experts.

    Args:
        dense: dense model that provides attention, embeddings, connectors, and the FFNs of layers
            without experts.
        experts: `ffn_state` of each expert, in expert order; the names become `expert_origins` of
            the configuration.
        top_k: number of experts per token.
        **moe_fields: further MoE fields of `UniMoEConfig`, such as `moe_layers` and loss
            coefficients.

    Returns:
        A new model on the same device, with routers drawn from normal(0, initializer_range). Shared
        experts are copies of the FFN of `dense` in their layer.

    Raises:
        ValueError: If there are no experts, `dense` already has MoE layers, or shared experts are
            not as wide as the FFNs.
    """
    if not experts:
        raise ValueError("experts must hold at least one FFN")
    if dense.config.num_experts:
        raise ValueError(f"dense has num_experts ({dense.config.num_experts}), expected 0")
    fields = (
        dense.config.to_dict()
        | {"num_experts": len(experts), "num_experts_per_tok": top_k}
        | {"expert_origins": list(experts)}
        | moe_fields
    )
    model = UniMoEForConditionalGeneration(UniMoEConfig.from_dict(fields))
    model.to(dtype=dense.dtype)
    incoming = dense.state_dict()
    missing, unexpected = model.load_state_dict(incoming, strict=False)
    for index, moe in model.moe_layers():
        ffns = [
            {f"{name}.weight": state[f"{index}.{name}.weight"] for name in FFN_NAMES}
            for state in experts.values()
        ]
        _fill_experts(moe.experts, ffns)
        if moe.shared_experts is not None:
            own = dense.model.language_model.layers[index].mlp
            _fill_experts(moe.shared_experts, [own] * moe.shared_experts.num_experts)
        prefix = f"model.language_model.layers.{index}.mlp."
        missing = [key for key in missing if not key.startswith(prefix)]
        unexpected = [key for key in unexpected if not key.startswith(prefix)]
    if missing or unexpected:
        raise ValueError(f"weights left over: missing {missing}, unexpected {unexpected}")
    return model.to(dense.device)


@torch.no_grad()
def _fill_experts(experts: GroupedExperts, ffns: list[dict[str, torch.Tensor]]) -> None:
    filled = MoE.from_ffns(ffns, 1).experts
    if filled.intermediate_size != experts.intermediate_size:
        raise ValueError(
            f"shared_intermediate_size ({experts.intermediate_size}) must be the width of the FFNs"
            f" that shared experts start from ({filled.intermediate_size})"
        )
    experts.load_state_dict(filled.state_dict())


@torch.no_grad()
def merge_and_unload_lora(model: UniMoEForConditionalGeneration) -> None:
    """Merges all LoRA into the weights and removes it, in place."""
    for parent, name, child in list(_lora_linears(model)):
        child.merge()
        setattr(parent, name, child.get_base_layer())
    if any(".expert_lora." in name for name, _ in model.named_parameters()):
        merge_and_unload_expert_lora(model)


def _lora_linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, LoraLayer]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, LoraLayer):
                yield parent, name, child
