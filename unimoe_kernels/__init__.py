"""Mixture-of-experts layers and operators.

The public API is exactly `__all__`.
"""

# Loading the extension registers the C++ and CUDA operators. The backends of an operator are
# determined when it is declared, so this import comes first.
from unimoe_kernels import _extension  # noqa: F401
from unimoe_kernels._backends import available_backends, use_backend
from unimoe_kernels._files import atomic_write, recover_folder, replace_folder
from unimoe_kernels.caching_allocator import use_caching_allocator
from unimoe_kernels.integrations import (
    add_expert_lora,
    load_and_quantize,
    load_expert_lora,
    load_quantized,
    load_upcycled,
    merge_and_unload_expert_lora,
    merge_expert_lora,
    quantize_experts,
    register_with_transformers,
    save_expert_lora,
    train_expert_lora,
    unmerge_expert_lora,
    upcycle,
)
from unimoe_kernels.layers import (
    GroupedExperts,
    LoopedMoE,
    MoE,
    QuantizedExperts,
    RouterConfig,
    RouterOutput,
    SwiGLUFFN,
    TopKRouter,
    inject_aux_loss,
    merge_lora_weight,
    pack_weights,
    stack_experts,
    unpack_weights,
    unstack_experts,
)
from unimoe_kernels.ops import (
    ExpertSort,
    TopKRouterOutput,
    expert_sort,
    grouped_lora,
    grouped_mm,
    grouped_mm_quantized,
    moe_mlp,
    moe_mlp_quantized,
    permute,
    swiglu,
    topk_router,
    unpermute,
)
from unimoe_kernels.quantization.rounding import dequantize_weight, quantize_weight
from unimoe_kernels.quantization.weight import QuantizedWeight

__version__ = "0.2.0"

__all__ = [
    "ExpertSort",
    "GroupedExperts",
    "LoopedMoE",
    "MoE",
    "QuantizedExperts",
    "QuantizedWeight",
    "RouterConfig",
    "RouterOutput",
    "SwiGLUFFN",
    "TopKRouter",
    "TopKRouterOutput",
    "__version__",
    "add_expert_lora",
    "atomic_write",
    "available_backends",
    "dequantize_weight",
    "expert_sort",
    "grouped_lora",
    "grouped_mm",
    "grouped_mm_quantized",
    "inject_aux_loss",
    "load_and_quantize",
    "load_expert_lora",
    "load_quantized",
    "load_upcycled",
    "merge_and_unload_expert_lora",
    "merge_expert_lora",
    "merge_lora_weight",
    "moe_mlp",
    "moe_mlp_quantized",
    "pack_weights",
    "permute",
    "quantize_experts",
    "quantize_weight",
    "recover_folder",
    "register_with_transformers",
    "replace_folder",
    "save_expert_lora",
    "stack_experts",
    "swiglu",
    "topk_router",
    "train_expert_lora",
    "unmerge_expert_lora",
    "unpack_weights",
    "unpermute",
    "unstack_experts",
    "upcycle",
    "use_backend",
    "use_caching_allocator",
]
