"""`topk_router`: top-k routing with scores and auxiliary losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unimoe_kernels import _backends, _checks
from unimoe_kernels.ops.topk_router import reference

MODES = ("topk_softmax", "softmax_topk", "softmax_topk_renorm", "sigmoid", "sigmoid_renorm")
BALANCES = ("all", "first")


class TopKRouterOutput(NamedTuple):
    """Output of `topk_router`.

    Attributes:
        scores: `[T, K]`, float32 (float64 for float64 logits), weights of the chosen experts, best
            choice first.
        ids: `[T, K]`, int32, the chosen experts.
        tokens_per_expert: `[E]`, int32, number of rows routed to each expert, masked tokens
            included.
        load_balancing_loss: Scalar in the dtype of `scores`; 1 if the load is even.
        router_z_loss: Scalar in the dtype of `scores`.
    """

    scores: Tensor
    ids: Tensor
    tokens_per_expert: Tensor
    load_balancing_loss: Tensor
    router_z_loss: Tensor


def topk_router(
    logits: Tensor,
    top_k: int,
    *,
    mode: str = "topk_softmax",
    correction_bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    token_mask: Tensor | None = None,
    balance: str = "all",
) -> TopKRouterOutput:
    """Selects the `top_k` experts of each token; ties go to the lower id.

    ======================  =======================  ======================================
    mode                    chosen by                scores
    ======================  =======================  ======================================
    `topk_softmax`          logits                   softmax over the chosen (Uni-MoE, Mixtral)
    `softmax_topk`          logits                   softmax over all experts
    `softmax_topk_renorm`   logits                   the same, divided by its sum over the chosen
    `sigmoid`               sigmoid                  sigmoid
    `sigmoid_renorm`        sigmoid                  the same, divided by its sum (DeepSeek-V3)
    ======================  =======================  ======================================

    `load_balancing_loss = E * sum_e f_e * P_e`, with `f_e` the fraction of choices that fall on
    expert `e` and `P_e` its mean probability (softmax, or sigmoid divided by its sum over E).
    `router_z_loss = mean(logsumexp(logits) ** 2)`. Both are means over the tokens of `token_mask`.

    Example:
        >>> routed = topk_router(torch.tensor([[2.0, 1.0, 2.0], [0.0, 5.0, 5.0 - math.log(3)]]), 2)
        >>> routed.ids.tolist()
        [[0, 2], [1, 2]]
        >>> routed.scores
        tensor([[0.5000, 0.5000],
                [0.7500, 0.2500]])

    Args:
        logits: `[T, E]`, float16, bfloat16, float32 or float64, any strides.
        top_k: Number of experts per token K.
        mode: See the table.
        correction_bias: `[E]` or None, added to the probabilities (sigmoid, or softmax over all
            experts) for the selection only. No gradient flows into it. Not supported with
            `topk_softmax`.
        num_groups: Number of equal groups that the experts form, in order of their ids.
        top_groups: Number of groups from which a token's experts are selected: those with the
            highest best expert or, with `correction_bias`, the highest sum of the best two.
        scale: Factor applied to the scores.
        token_mask: `[T]`, bool, or None. Tokens with False are routed like all others but excluded
            from both losses, which are 0 if no token is True.
        balance: `"all"` counts all K choices of a token in `f_e`, `"first"` only its best.

    Returns:
        A `TopKRouterOutput` on the device of `logits`.

    Raises:
        ValueError: If `logits` is not 2-D, `top_k`, `num_groups` or `top_groups` is incompatible
            with E, `correction_bias` or `token_mask` has a wrong shape or device, or `mode` or
            `balance` is unknown. With `UNIMOE_CHECKS=1` also if a logit is NaN.
        TypeError: If a dtype is not one of those above.

    Note:
        Scores and losses are differentiable in `logits`; deterministic. Everything is computed in
        float32 (float64 for float64).

    Reference:
        arXiv:2405.11273 (Uni-MoE), arXiv:2006.16668 (balancing, "first"), arXiv:2101.03961
        (balancing), arXiv:2202.08906 (z-loss), arXiv:2412.19437 (sigmoid, bias, groups).
    """
    _check(logits, top_k, mode, correction_bias, num_groups, top_groups, token_mask, balance)
    if _checks.reads_values(logits) and logits.isnan().any():
        raise ValueError(f"logits ({int(logits.isnan().sum())} NaN) must not be NaN")
    outputs = _backends.call(
        "topk_router",
        logits.contiguous(),
        None if correction_bias is None else correction_bias.contiguous(),
        None if token_mask is None else token_mask.contiguous(),
        top_k,
        mode,
        num_groups,
        top_groups,
        scale,
        balance,
    )
    return TopKRouterOutput(*outputs)


@_checks.once_per_signature
def _check(logits, top_k, mode, correction_bias, num_groups, top_groups, token_mask, balance):
    _checks.check_tensor("logits", logits, "[T, E]")
    num_experts = logits.shape[1]
    _checks.check_choice("mode", mode, MODES)
    _checks.check_choice("balance", balance, BALANCES)
    _checks.check_positive("top_k", top_k)
    if top_k > num_experts:
        raise ValueError(f"top_k ({top_k}) must be at most num_experts ({num_experts})")
    _checks.check_positive("num_groups", num_groups)
    _checks.check_positive("top_groups", top_groups)
    if num_experts % num_groups:
        raise ValueError(f"num_groups ({num_groups}) must divide num_experts ({num_experts})")
    if top_groups > num_groups:
        raise ValueError(f"top_groups ({top_groups}) must be at most num_groups ({num_groups})")
    usable = num_experts // num_groups * top_groups
    if top_k > usable:
        raise ValueError(
            f"top_k ({top_k}) must be at most the experts of top_groups ({top_groups}) groups "
            f"({usable})"
        )
    if correction_bias is not None:
        if mode == "topk_softmax":
            raise ValueError("correction_bias is not supported with mode='topk_softmax'")
        _checks.check_tensor("correction_bias", correction_bias, "[E]")
        _checks.check_size("correction_bias", correction_bias, 0, num_experts, "E of logits")
        _checks.check_device("correction_bias", correction_bias, "logits", logits)
    if token_mask is not None:
        _checks.check_tensor("token_mask", token_mask, "[T]", (torch.bool,))
        _checks.check_size("token_mask", token_mask, 0, logits.shape[0], "T of logits")
        _checks.check_device("token_mask", token_mask, "logits", logits)


def _fake(
    logits,
    correction_bias,
    token_mask,
    top_k,
    mode,
    num_groups,
    top_groups,
    scale,
    balance,
):
    dtype = _checks.accumulation_dtype(logits.dtype)
    num_tokens, num_experts = logits.shape
    return (
        logits.new_empty((num_tokens, top_k), dtype=dtype),
        logits.new_empty((num_tokens, top_k), dtype=torch.int32),
        logits.new_empty((num_experts,), dtype=torch.int32),
        logits.new_empty((), dtype=dtype),
        logits.new_empty((), dtype=dtype),
    )


def _triton(*args):
    from unimoe_kernels.ops.topk_router import kernel

    return kernel.topk_router(*args)


def _setup_context(ctx, inputs, output):
    logits, _, token_mask, _, ctx.mode, _, _, ctx.scale, ctx.balance = inputs
    _, ids, tokens_per_expert, _, _ = output
    ctx.mark_non_differentiable(ids, tokens_per_expert)
    ctx.save_for_backward(logits, ids, token_mask)


def _backward(backend, ctx, grad_scores, _ids, _counts, grad_balancing, grad_z):
    grad_logits = _backends.run(
        backend,
        "topk_router_backward",
        grad_scores.contiguous(),
        grad_balancing,
        grad_z,
        *ctx.saved_tensors,
        ctx.mode,
        ctx.scale,
        ctx.balance,
    )
    return grad_logits, None, None, None, None, None, None, None, None


def _backward_fake(
    grad_scores, grad_balancing, grad_z, logits, ids, token_mask, mode, scale, balance
):
    return logits.new_empty(logits.shape)


def _backward_triton(*args):
    from unimoe_kernels.ops.topk_router import kernel_backward

    return kernel_backward.topk_router_backward(*args)


_backends.declare(
    "topk_router_backward",
    "(Tensor grad_scores, Tensor grad_balancing, Tensor grad_z, Tensor logits, Tensor ids, "
    "Tensor? token_mask, str mode, float scale, str balance) -> Tensor",
    reference=reference.topk_router_backward,
    triton=_backward_triton,
    fake=_backward_fake,
    public=False,
)
_backends.declare(
    "topk_router",
    "(Tensor logits, Tensor? correction_bias, Tensor? token_mask, int top_k, str mode, "
    "int num_groups, int top_groups, float scale, str balance) -> (Tensor scores, Tensor ids, "
    "Tensor tokens_per_expert, Tensor load_balancing_loss, Tensor router_z_loss)",
    reference=reference.topk_router,
    triton=_triton,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
