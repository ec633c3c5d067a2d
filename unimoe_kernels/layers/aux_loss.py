"""Adds the gradient of an auxiliary loss to a tensor that a host already passes on."""

import torch


class _InjectAuxLoss(torch.autograd.Function):
    """Hands y through; its backward gives the auxiliary loss the gradient that `+ loss` would."""

    @staticmethod
    def forward(y: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        # autograd forbids a host to change a view that comes out of a function, as by `y += x`.
        return y.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, loss = inputs
        ctx.loss_dtype = loss.dtype

    @staticmethod
    def backward(ctx, grad_y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad_y, grad_y.new_ones((), dtype=ctx.loss_dtype)


class _InjectTransformed(_InjectAuxLoss):
    """The same with rules for forward mode and vmap, which `torch.compile` does not trace."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, tangent_y: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return tangent_y.clone()


def inject_aux_loss(y: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """Returns y, and makes every backward through it also differentiate `loss` with weight 1.

    The gradients are those of `host_loss(y) + loss`, whatever the host does with y, so an auxiliary
    loss reaches the router of a model whose code passes nothing but hidden states. It acts once a
    backward: recomputation under activation checkpointing runs the forward again and the backward
    still once, and without recorded gradients nothing happens at all.

    Args:
        y: any shape, floating point; the tensor that the host goes on with.
        loss: `()`, floating point; already multiplied by its coefficient.

    Returns:
        A new tensor with the values, shape and dtype of y, which the host may change in place.

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
