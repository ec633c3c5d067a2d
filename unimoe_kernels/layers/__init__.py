"""Layers over the public operators."""

from unimoe_kernels.layers.aux_loss import inject_aux_loss
from unimoe_kernels.layers.experts import GroupedExperts
from unimoe_kernels.layers.layouts import stack_experts, unstack_experts
from unimoe_kernels.layers.looped_moe import LoopedMoE, SwiGLUFFN
from unimoe_kernels.layers.moe import MoE
from unimoe_kernels.layers.router import TopKRouter

__all__ = [
    "GroupedExperts",
    "LoopedMoE",
    "MoE",
    "SwiGLUFFN",
    "TopKRouter",
    "inject_aux_loss",
    "stack_experts",
    "unstack_experts",
]
