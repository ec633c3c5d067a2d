"""Tracking of the modules that a step used on any process."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from unimoe_kernels.distributed import collective


class UsedModules:
    """Records which modules run a forward, so that those used by no process are not updated.

    FSDP2 gives unused parameters gradients of zeros, with which AdamW still steps by its momentum.
    In a single process they have no gradient and are not updated.

    Args:
        parts: modules that a step may not use, such as connectors of media kinds that none of its
            samples have. Their modules with trained parameters are tracked.
    """

    def __init__(self, parts: Iterable[nn.Module]):
        self._modules = [
            module
            for part in parts
            for module in part.modules()
            if any(p.requires_grad for p in module.parameters(recurse=False))
        ]
        self._used = torch.zeros(len(self._modules) + 1)
        for place, module in enumerate(self._modules):
            module.register_forward_hook(lambda *_, place=place: self._note(place))

    def drop_other_gradients(self) -> None:
        """Drops gradients of modules that no process used since the last call.

        All processes must call it.
        """
        used = self._used.clone()
        self._used.zero_()
        with collective("parts that a step used"):
            dist.all_reduce(used)
        for module, count in zip(self._modules, used.tolist(), strict=False):
            if not count:
                for parameter in module.parameters(recurse=False):
                    parameter.grad = None

    def _note(self, place: int) -> None:
        self._used[place] = 1
