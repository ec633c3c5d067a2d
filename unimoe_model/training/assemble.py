"""From stage 2 to stage 3: FFNs become the experts of an MoE model, and LoRA is merged."""

from collections.abc import Iterator, Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from unimoe_kernels import MoE, merge_and_unload_expert_lora
from unimoe_model.configuration import UniMoEConfig
from unimoe_model.modeling import UniMoEForConditionalGeneration

FFN_NAMES = ("gate_proj", "up_proj", "down_proj")


def ffn_state(model: UniMoEForConditionalGeneration) -> dict[str, torch.Tensor]:
    """A copy of the dense FFN weights of every layer: `<layer>.<gate|up|down>_proj.weight`."""
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
    """Builds the MoE model of stage 3 from a dense model and its FFNs, one set a modality.

    Args:
        dense: the dense model; attention, embeddings and connectors are taken from it, and its own
            FFN stays in the layers without experts.
        experts: `ffn_state` of each expert, in expert order; the names are kept in the
            configuration as `expert_origins`.
        top_k: experts a token is routed to.
        **moe_fields: further MoE fields of `UniMoEConfig` (`moe_layers`, loss
            coefficients).

    Returns:
        A new model with a router that starts at normal(0, initializer_range).

    Raises:
        ValueError: If there are no experts, or the model has MoE layers already.
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
        _fill_experts(moe, ffns, top_k)
        prefix = f"model.language_model.layers.{index}.mlp."
        missing = [key for key in missing if not key.startswith(prefix)]
        unexpected = [key for key in unexpected if not key.startswith(prefix)]
    if missing or unexpected:
        raise ValueError(f"weights left over: missing {missing}, unexpected {unexpected}")
    return model.to(dense.device)


@torch.no_grad()
def _fill_experts(moe: MoE, ffns: list[dict[str, torch.Tensor]], top_k: int) -> None:
    assembled = MoE.from_ffns(ffns, top_k)
    moe.experts.load_state_dict(assembled.experts.state_dict())


@torch.no_grad()
def merge_and_unload_lora(model: UniMoEForConditionalGeneration) -> None:
    """Adds every LoRA product to its weight and removes the LoRA, in place."""
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
