"""Ways into other packages; each imports the other package when it is called."""

from unimoe_kernels.integrations.expert_lora import (
    add_expert_lora,
    load_expert_lora,
    merge_and_unload_expert_lora,
    merge_expert_lora,
    save_expert_lora,
    train_expert_lora,
    unmerge_expert_lora,
)
from unimoe_kernels.integrations.transformers import register_with_transformers
from unimoe_kernels.integrations.upcycle import load_upcycled, upcycle

__all__ = [
    "add_expert_lora",
    "load_expert_lora",
    "load_upcycled",
    "merge_and_unload_expert_lora",
    "merge_expert_lora",
    "register_with_transformers",
    "save_expert_lora",
    "train_expert_lora",
    "unmerge_expert_lora",
    "upcycle",
]
