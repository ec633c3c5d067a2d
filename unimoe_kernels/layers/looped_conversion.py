"""Conversion of a `MoE` to the published layer, `LoopedMoE`."""

from __future__ import annotations

import torch

from unimoe_kernels import _checks
from unimoe_kernels.layers.experts import GroupedExperts
from unimoe_kernels.layers.layouts import unstack_experts
from unimoe_kernels.layers.looped_moe import LoopedMoE
from unimoe_kernels.layers.router import TopKRouter


@torch.no_grad()
def looped_of(router: TopKRouter, experts: GroupedExperts, num_shared: int) -> LoopedMoE:
    """Copies the weights of router and experts into a new layer; see `MoE.to_looped`."""
    config = router.config
    expected = {
        "router.config.mode": (config.mode, "topk_softmax"),
        "router.config.scale": (config.scale, 1.0),
        "router.config.top_groups": (config.top_groups, config.num_groups),
        "router.config.num_null_experts": (config.num_null_experts, 0),
        "router.config.top_p": (config.top_p, None),
        "router.config.capacity_factor": (config.capacity_factor, None),
        "router.config.jitter": (config.jitter, 0.0),
        "router.config.router_dtype": (config.router_dtype, None),
        "num_shared_experts": (num_shared, 0),
        "experts.activation": (experts.activation, "silu"),
        "experts.bias": (experts.gate_up_bias is not None, False),
        "experts.lora_rank": (experts.lora_rank, 0),
        "experts.format": (getattr(experts, "format", None), None),
    }
    for name, (value, needed) in expected.items():
        if value != needed:
            raise ValueError(f"{name} ({value!r}) must be {needed!r} to convert to LoopedMoE")
    for part, module in (("router", router), ("experts", experts)):
        for name, weight in module.named_parameters(part):
            _checks.refuse_sharded(name, weight)
    # Initialising weights that are replaced would take longer than everything else here.
    looped = LoopedMoE(
        router.hidden_size,
        experts.intermediate_size,
        router.num_experts,
        router.top_k,
        device="meta",
        dtype=router.weight.dtype,
    ).to_empty(device=router.weight.device)
    looped.gate.weight.copy_(router.weight)
    ffns = unstack_experts(experts.gate_up_proj.detach(), experts.down_proj.detach())
    for expert, weights in zip(looped.experts, ffns, strict=True):
        expert.load_state_dict(weights)
    return looped
