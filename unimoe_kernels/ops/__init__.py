"""Operators, one folder each.

`op.py` holds the public function, schema, fake implementation and gradient formula; `reference.py`
the specification in plain torch; `plain.py`, if it differs from the reference, the implementation
used under torch's transforms; `kernel.py` and `kernel_backward.py` the Triton kernels. An operator
composed of others has `composition.py` instead of a reference; `moe_mlp/fused.py` is the fused
Triton implementation of one, and `moe_mlp/packed.py` caches packed weights. References of operators
on quantised weights dequantise them (`quantization/`). `moe_mlp/run_experts.py` also supports
experts that `moe_mlp` does not cover, and `topk_router/losses.py` has both losses of a router.
"""

from unimoe_kernels import _backends
from unimoe_kernels.ops.expert_sort.op import ExpertSort, expert_sort
from unimoe_kernels.ops.grouped_lora.op import grouped_lora
from unimoe_kernels.ops.grouped_mm.op import grouped_mm
from unimoe_kernels.ops.grouped_mm_quantized.op import grouped_mm_quantized
from unimoe_kernels.ops.moe_mlp.arguments import ExpertWeights
from unimoe_kernels.ops.moe_mlp.op import moe_mlp
from unimoe_kernels.ops.moe_mlp.packed import (
    PACKABLE,
    forget_expert_weight,
    pack_expert_weight,
)
from unimoe_kernels.ops.moe_mlp.run_experts import run_experts
from unimoe_kernels.ops.moe_mlp_quantized.op import moe_mlp_quantized
from unimoe_kernels.ops.permute.op import permute
from unimoe_kernels.ops.swiglu.op import swiglu
from unimoe_kernels.ops.topk_router.losses import router_losses
from unimoe_kernels.ops.topk_router.op import TopKRouterOutput, topk_router
from unimoe_kernels.ops.unpermute.op import unpermute

_backends.find_kernels()

__all__ = [
    "PACKABLE",
    "ExpertSort",
    "ExpertWeights",
    "TopKRouterOutput",
    "expert_sort",
    "forget_expert_weight",
    "grouped_lora",
    "grouped_mm",
    "grouped_mm_quantized",
    "moe_mlp",
    "moe_mlp_quantized",
    "pack_expert_weight",
    "permute",
    "router_losses",
    "run_experts",
    "swiglu",
    "topk_router",
    "unpermute",
]
