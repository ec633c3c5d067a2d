"""Frozen weights in the dtype that autocast multiplies them in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from unimoe_kernels import GroupedExperts

_MULTIPLIED = (nn.Linear, GroupedExperts)


@contextmanager
def frozen_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Converts frozen weights of matmuls to `dtype` in the block, and restores them after it.

    Autocast converts frozen weights in every forward, and keeps the results until the backward.
    Converted once, they give the same outputs in less time and as much memory. Weights that other
    modules use too, such as embeddings tied to the head, are left as they are.

    Args:
        model: the model, whose trained parameters require gradients.
        dtype: dtype of the matmuls under autocast.
    """
    kept = {}
    for own in _frozen(model):
        if own.is_floating_point() and own.dtype != dtype:
            kept[own] = own.data
            own.data = own.data.to(dtype)
    try:
        yield
    finally:
        for own, data in kept.items():
            own.data = data


def _frozen(model: nn.Module) -> list[nn.Parameter]:
    others = {
        id(own)
        for module in model.modules()
        if not isinstance(module, _MULTIPLIED)
        for own in module.parameters(recurse=False)
    }
    return [
        own
        for module in model.modules()
        if isinstance(module, _MULTIPLIED)
        for own in module.parameters(recurse=False)
        if not own.requires_grad and id(own) not in others
    ]
