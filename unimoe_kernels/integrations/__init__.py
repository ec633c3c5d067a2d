"""Integrations with other packages, each of which is imported only when it is used."""

from unimoe_kernels.integrations.expert_lora import (
    add_expert_lora,
    load_expert_lora,
    merge_and_unload_expert_lora,
    merge_expert_lora,
    save_expert_lora,
    train_expert_lora,
    unmerge_expert_lora,
)
from unimoe_kernels.integrations.quantize import quantize_experts
from unimoe_kernels.integrations.quantized_folder import load_quantized
from unimoe_kernels.integrations.quantized_loading import load_and_quantize
from unimoe_kernels.integrations.transformers import register_with_transformers
from unimoe_kernels.integrations.upcycle import load_upcycled, upcycle

__all__ = [
    "add_expert_lora",
    "load_and_quantize",
    "load_expert_lora",
    "load_quantized",
    "load_upcycled",
    "merge_and_unload_expert_lora",
    "merge_expert_lora",
    "quantize_experts",
    "register_with_transformers",
    "save_expert_lora",
    "train_expert_lora",
    "unmerge_expert_lora",
    "upcycle",
]
