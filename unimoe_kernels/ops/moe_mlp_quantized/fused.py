"""The forward of `moe_mlp_quantized` in Triton, with the steps of `moe_mlp/fused.py`.

The backward is that of `composition.py`, which runs the kernels of its parts.
"""

from __future__ import annotations

from torch import Tensor

from unimoe_kernels import _backends
from unimoe_kernels.ops.grouped_mm_quantized import kernel as product
from unimoe_kernels.ops.moe_mlp.arguments import Gate
from unimoe_kernels.ops.moe_mlp.pipeline import sort_rows
from unimoe_kernels.ops.moe_mlp_quantized import kernel
from unimoe_kernels.ops.moe_mlp_quantized.arguments import NUM_WEIGHTS, unflatten


def forward(x: Tensor, ids: Tensor, scores: Tensor, *flat) -> tuple[Tensor, ...]:
    """Returns the same tuple as `composition.forward`."""
    weights = unflatten(*flat[:NUM_WEIGHTS])
    *gate, keep_hidden = flat[NUM_WEIGHTS:]
    gate, top_k = Gate(*gate), ids.shape[1]
    rows = sort_rows(_backends.call, ids, weights.first.shape[0])
    first, down = weights.first[:3], weights.down[:3]
    parts = kernel.num_parts(x, *first, rows.order.shape[0])
    if parts == 1:
        a_NF, h_NG = kernel.gated(
            x, *first, weights.first_bias, rows.offsets, rows.order, top_k, gate, keep_hidden
        )
    else:
        partial = product.partial_products(x, *first, rows.offsets, rows.order, top_k, parts)
        a_NF, h_NG = kernel.activate_parts(
            x, partial, weights.first_bias, rows.offsets, gate, keep_hidden
        )
    y_ND = product.grouped_mm_quantized(a_NF, *down, rows.offsets, weights.down_bias, tail=False)
    y_TD = _backends.call("unpermute", y_ND, rows.inverse, rows.offsets, scores, top_k)
    return y_TD, h_NG, *rows
