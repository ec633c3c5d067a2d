"""Default overload of `moe_mlp` on a GPU: a whole layer in one call to CUDA C++.

Calls that these kernels do not support run in Triton or, if Triton is missing, as the composition
of other operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unimoe_kernels import _backends
from unimoe_kernels.ops import cuda_matmul
from unimoe_kernels.ops.moe_mlp import composition
from unimoe_kernels.ops.moe_mlp.arguments import ExpertWeights, Gate, Grads, Needs, Rows, Saved


def _layer_fake(x, gate_up_proj, down_proj, ids, scores, keep_hidden):
    rows, num_experts = ids.shape[0] * ids.shape[1], gate_up_proj.shape[0]
    return (
        x.new_empty(x.shape),
        x.new_empty((rows if keep_hidden else 0, gate_up_proj.shape[1])),
        ids.new_empty((rows,), dtype=torch.int32),
        ids.new_empty((rows,), dtype=torch.int32),
        ids.new_empty((num_experts + 1,), dtype=torch.int32),
    )


_backends.declare_compiled(
    "moe_mlp_cuda",
    "(Tensor x, Tensor gate_up_proj, Tensor down_proj, Tensor ids, Tensor scores, "
    "bool keep_hidden) -> (Tensor y, Tensor gate_up_rows, Tensor row_order, Tensor inverse_order, "
    "Tensor expert_offsets)",
    fake=_layer_fake,
)


def _backward_fake(grad, x, gate_up_proj, down_proj, scores, *rest):
    needs = zip((x, gate_up_proj, down_proj, scores), rest[-4:], strict=True)
    return tuple(one.new_empty(one.shape if needed else (0,)) for one, needed in needs)


_backends.declare_compiled(
    "moe_mlp_cuda_backward",
    "(Tensor grad, Tensor x, Tensor gate_up_proj, Tensor down_proj, Tensor scores, "
    "Tensor gate_up_rows, Tensor row_order, Tensor inverse_order, Tensor expert_offsets, "
    "bool needs_x, bool needs_gate_up, bool needs_down, bool needs_scores) -> (Tensor grad_x, "
    "Tensor grad_gate_up_proj, Tensor grad_down_proj, Tensor grad_scores)",
    fake=_backward_fake,
)
# The first matmul and its SiLU gate for few rows per expert: rows are gathered from x, and the
# activations are in expert order.
_backends.declare_compiled(
    "gated_few_rows",
    "(Tensor x, Tensor gate_up_proj, Tensor expert_offsets, Tensor row_order, int top_k) -> Tensor",
    fake=lambda x, gate_up_proj, expert_offsets, row_order, top_k: x.new_empty(
        (row_order.shape[0], gate_up_proj.shape[1] // 2)
    ),
)
_backends.declare_compiled(
    "moe_mlp_cuda_inference",
    "(Tensor x, Tensor gate_up_proj, Tensor down_proj, Tensor ids, Tensor scores) -> Tensor",
    fake=lambda x, *_: x.new_empty(x.shape),
)
_layer = torch.ops.unimoe.moe_mlp_cuda.default
_inference = torch.ops.unimoe.moe_mlp_cuda_inference.default

MOST_SIGNATURES = 1024
_taken: dict[tuple, bool] = {}


def takes(x: Tensor, ids: Tensor, weights: ExpertWeights, gate: Gate, keep_hidden: bool) -> bool:
    """Returns whether the CUDA C++ layer supports a call; x and ids must be contiguous."""
    gpu = cuda_matmul.gpu_of(x)
    # Fake tensors and other subclasses have no address.
    if gpu is None or type(x) is not Tensor:
        return False
    first, down, first_bias, down_bias = weights
    # A key of everything the choice depends on, faster to create and look up than layouts.
    signature = (
        gpu,
        x.shape,
        x.dtype,
        first.shape,
        first.stride(),
        down.shape,
        down.stride(),
        (x.data_ptr() | first.data_ptr() | down.data_ptr()) % 16,
        ids.shape[1],
        gate.activation,
        first_bias is None and down_bias is None,
        keep_hidden,
    )
    taken = _taken.get(signature)
    if taken is None:
        layouts = map(cuda_matmul.layout_of, (x, first, down))
        has_bias = first_bias is not None or down_bias is not None
        options = ids.shape[1], gate.activation, has_bias, keep_hidden
        if len(_taken) >= MOST_SIGNATURES:
            _taken.clear()
        taken = cuda_matmul.choose_layer(gpu, *layouts, *options).kernel is not None
        _taken[signature] = taken
    return taken


def infer(x: Tensor, ids: Tensor, scores: Tensor, weights: ExpertWeights) -> Tensor:
    """Runs a layer without saving anything for a backward; requires `takes` to be True."""
    with torch._C._AutoDispatchBelowAutograd():
        return _inference(x, weights.first, weights.down, ids, scores)


def forward(
    x: Tensor,
    ids: Tensor,
    scores: Tensor,
    weights: ExpertWeights,
    gate: Gate,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Rows]:
    """Returns the same as `composition.forward`."""
    if takes(x, ids, weights, gate, keep_hidden):
        y, hidden, *rows = _layer(x, weights.first, weights.down, ids, scores, keep_hidden)
        return y, hidden, Rows(*rows)
    if _backends.has_triton("moe_mlp", x):
        from unimoe_kernels.ops.moe_mlp import fused

        return fused.forward(x, ids, scores, weights, gate, keep_hidden)
    return composition.forward("default", x, ids, scores, weights, gate, keep_hidden)


def backward(grad: Tensor, saved: Saved, gate: Gate, needs: Needs) -> Grads:
    """Returns the same as `composition.backward`."""
    x, scores, weights, hidden, rows = saved
    if _takes_backward(grad, saved, gate, needs):
        grads = torch.ops.unimoe.moe_mlp_cuda_backward.default(
            *(grad, x, weights.first, weights.down, scores, hidden, *rows),
            *(needs.x, needs.first, needs.down, needs.scores),
        )
        grad_x, grad_first, grad_down, grad_scores = grads
        return Grads(grad_x, grad_first, grad_down, grad_scores, x.new_empty(0), x.new_empty(0))
    if _backends.has_triton("moe_mlp_backward", x):
        from unimoe_kernels.ops.moe_mlp import fused

        return fused.backward(grad, saved, gate, needs)
    return composition.backward("default", grad, saved, gate, needs)


def _takes_backward(grad: Tensor, saved: Saved, gate: Gate, needs: Needs) -> bool:
    x, scores, weights, _, _ = saved
    gpu = cuda_matmul.gpu_of(x)
    if gpu is None:
        return False
    has_bias = weights.down_bias is not None or needs.first_bias or needs.down_bias
    layouts = map(cuda_matmul.layout_of, (grad, x, weights.first, weights.down))
    return (
        cuda_matmul.choose_layer_backward(
            gpu, *layouts, scores.shape[1], gate.activation, has_bias
        ).kernel
        is not None
    )
