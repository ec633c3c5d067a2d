"""Examples of `topk_router`, in each mode."""

import torch

from cases import Case, empty
from unimoe_kernels import topk_router
from unimoe_kernels.ops.topk_router.op import MODES


def router(mode, masked=False, **options):
    def function(ids, num_experts, logits):
        # Not counted: tokens of which a choice is another rank's.
        mask = (ids < num_experts).all(1) if masked else None
        route = topk_router(logits, ids.shape[1], mode=mode, token_mask=mask, **options)
        return route.scores, route.load_balancing_loss, route.router_z_loss

    return function


def shapes(sizes):
    return ((sizes.T, sizes.E),)


CASES = [Case(mode, router(mode), shapes) for mode in MODES] + [
    Case("masked", router("softmax_topk", masked=True, balance="first"), shapes),
    Case("scaled", router("sigmoid_renorm", masked=True, scale=2.0), shapes),
]


def launches(everything):
    for mode in MODES if everything else ("topk_softmax", "sigmoid_renorm"):
        yield mode, lambda mode=mode: route(4096, 128, 8, torch.bfloat16, mode)
    if everything:
        yield "wide", lambda: route(4096, 256, 8, torch.float64, "sigmoid_renorm")
        yield "large", lambda: route(4096, 4000, 16, torch.float32, "softmax_topk")


def launch(shape):
    route(shape.tokens, shape.experts, shape.top_k, shape.dtype, "sigmoid_renorm")


def route(tokens, num_experts, top_k, dtype, mode):
    """Without bias and groups, then with both where the mode takes them; and backward."""
    from unimoe_kernels.ops.topk_router import kernel, kernel_backward

    logits = empty(tokens, num_experts, dtype=dtype)
    score_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    scores, scalar = empty(tokens, top_k, dtype=score_dtype), empty((), dtype=score_dtype)
    ids, mask = empty(tokens, top_k, dtype=torch.int32), empty(tokens, dtype=torch.bool)
    bias = empty(num_experts, dtype=torch.float32)
    kernel.topk_router(logits, None, None, top_k, mode, 1, 1, 1.0, "all")
    if mode != "topk_softmax":
        kernel.topk_router(logits, bias, mask, top_k, mode, 8, 4, 2.5, "first")
    kernel_backward.topk_router_backward(
        scores, scalar, scalar, logits, ids, mask, mode, 2.5, "first"
    )
