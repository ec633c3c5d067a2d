"""Layers built on the public operators."""

from unimoe_kernels.layers.aux_loss import inject_aux_loss
from unimoe_kernels.layers.expert_lora import merge_lora_weight
from unimoe_kernels.layers.experts import GroupedExperts
from unimoe_kernels.layers.layouts import stack_experts, unstack_experts
from unimoe_kernels.layers.looped_moe import LoopedMoE, SwiGLUFFN
from unimoe_kernels.layers.moe import MoE
from unimoe_kernels.layers.packing import pack_weights, unpack_weights
from unimoe_kernels.layers.quantized_experts import QuantizedExperts
from unimoe_kernels.layers.router import TopKRouter
from unimoe_kernels.layers.router_config import RouterConfig
from unimoe_kernels.layers.router_output import RouterOutput

__all__ = [
    "GroupedExperts",
    "LoopedMoE",
    "MoE",
    "QuantizedExperts",
    "RouterConfig",
    "RouterOutput",
    "SwiGLUFFN",
    "TopKRouter",
    "inject_aux_loss",
    "merge_lora_weight",
    "pack_weights",
    "stack_experts",
    "unpack_weights",
    "unstack_experts",
]
