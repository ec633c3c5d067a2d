"""Operators, one folder each.

`op.py` holds the public function, schema, fake and gradient formula; `reference.py` the
specification in plain torch; `plain.py`, where that is another one, what transforms of torch go
through; `kernel.py` and `kernel_backward.py` the Triton kernels. An operator that is composed of
others has `composition.py` instead of a reference; `moe_mlp/fused.py` is what Triton runs in its
place, `moe_mlp/packed.py` keeps weights packed.
"""

from unimoe_kernels import _backends
from unimoe_kernels.ops.expert_sort.op import ExpertSort, expert_sort
from unimoe_kernels.ops.grouped_lora.op import grouped_lora
from unimoe_kernels.ops.grouped_mm.op import grouped_mm
from unimoe_kernels.ops.moe_mlp.op import moe_mlp
from unimoe_kernels.ops.moe_mlp.packed import pack_weights, unpack_weights
from unimoe_kernels.ops.permute.op import permute
from unimoe_kernels.ops.swiglu.op import swiglu
from unimoe_kernels.ops.topk_router.op import RouterOutput, topk_router
from unimoe_kernels.ops.unpermute.op import unpermute

_backends.find_kernels()

__all__ = [
    "ExpertSort",
    "RouterOutput",
    "expert_sort",
    "grouped_lora",
    "grouped_mm",
    "moe_mlp",
    "pack_weights",
    "permute",
    "swiglu",
    "topk_router",
    "unpack_weights",
    "unpermute",
]
