"""Injection of an auxiliary loss into the backward of a tensor."""

import torch


class _InjectAuxLoss(torch.autograd.Function):
    """Returns y unchanged; its backward also passes gradient 1 to the auxiliary loss."""

    @staticmethod
    def forward(y: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        # autograd forbids in-place changes, such as `y += x`, of views returned by a function.
        return y.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, loss = inputs
        ctx.loss_dtype = loss.dtype

    @staticmethod
    def backward(ctx, grad_y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad_y, grad_y.new_ones((), dtype=ctx.loss_dtype)


class _InjectTransformed(_InjectAuxLoss):
    """The same with rules for forward-mode AD and vmap, which `torch.compile` cannot trace."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, tangent_y: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return tangent_y.clone()


def inject_aux_loss(y: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """Returns y with `loss` attached: every backward through y also differentiates `loss`.

    The gradients are those of `model_loss(y) + loss`, so an auxiliary loss trains the router of a
    model whose blocks return only hidden states. The loss is added once per backward: under
    activation checkpointing the forward is recomputed, but the backward runs once. If gradients are
    not recorded, the function has no effect.

    Args:
        y: any shape, floating point; the tensor that the model continues with.
        loss: `()`, floating point; already multiplied by its coefficient.

    Returns:
        A new tensor with the values, shape and dtype of y, which may be changed in place.

    Raises:
        ValueError: If loss is not a scalar.

    Reference:
        The idea of scaling auxiliary losses through autograd is that of Megatron-LM
        (megatron/core/transformer/moe/moe_utils.py, MoEAuxLossAutoScaler).
    """
    if loss.dim() != 0:
        raise ValueError(f"loss (shape {tuple(loss.shape)}) must be a scalar of shape ()")
    inject = _InjectAuxLoss if torch.compiler.is_compiling() else _InjectTransformed
    return inject.apply(y, loss)
