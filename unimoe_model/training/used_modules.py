"""Which parts of a model the samples of a step passed, on any process."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from unimoe_kernels.distributed import collective


class UsedModules:
    """Notes which modules run forward, so that those that ran nowhere are left as they are.

    FSDP2 gives what was not used a gradient of zeros, with which AdamW takes a step by its
    momentum; a process alone has none, and takes no step.

    Args:
        parts: modules that a step may leave out, such as connectors of media kinds that no sample
            of it has. Those of their modules are watched that hold parameters with gradients.
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
        """Removes the gradients of what no process used since the last call; all call it."""
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
