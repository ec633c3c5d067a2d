"""Data parallelism of whole parameters: after every backward, gradients are summed over ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unimoe_kernels.distributed.running.failure import collective

# Gradients are sent in buffers of about this size: large enough to reach the bandwidth of a link,
# small compared with a model.
BUCKET_BYTES = 64 * 2**20


class GradientSum:
    """Sums the gradients of parameters over a group at the end of each backward.

    The sums of a model run together, in the same order on all ranks, also those whose parameters
    the backward of a rank did not reach. A parameter without a gradient on any rank keeps None. One
    without a gradient on this rank receives the sum of the others. Ranks may therefore use
    different parts of a model, such as with batches with and without images; but all ranks must run
    the same number of backwards, each of which must reach at least one parameter of the model.
    Several backwards before an optimiser step are accumulated. `torch.autograd.grad` returns the
    gradients of this rank and changes no `.grad`.

    Args:
        parameters: parameters by name, the same on all ranks; all must require gradients.
        group: the ranks that share them.
        operation: name of the sum in errors.
        sums: the sums of the same model, to which this one is added.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        group: dist.ProcessGroup,
        operation: str,
        sums: list[GradientSum],
    ) -> None:
        sums.append(self)
        self._sums = sums
        self._parameters = list(parameters)
        self._group = group
        self._operation = operation
        # Gradients of the current backward, and those accumulated before it, by index.
        self._fresh: dict[int, Tensor] = {}
        self._before: dict[int, Tensor] = {}
        # Parameters whose gradient this backward adds to `.grad`, unlike `torch.autograd.grad`.
        self._added: set[int] = set()
        self._hooks = [
            hook
            for place, parameter in enumerate(self._parameters)
            for hook in (
                parameter.register_hook(lambda grad, place=place: self._collect(place, grad)),
                parameter.register_post_accumulate_grad_hook(
                    lambda _, place=place: self._added.add(place)
                ),
            )
        ]

    def remove(self) -> None:
        """Removes the hooks; gradients are no longer summed."""
        for hook in self._hooks:
            hook.remove()

    def _collect(self, place: int, grad: Tensor) -> None:
        if not any(one._fresh for one in self._sums):
            torch.autograd.Variable._execution_engine.queue_callback(self._sum_all)
        if place in self._fresh:
            self._fresh[place] = self._fresh[place] + grad
            return
        self._fresh[place] = grad
        if self._parameters[place].grad is not None:
            self._before[place] = self._parameters[place].grad.clone()

    def _sum_all(self) -> None:
        is_backward = any(one._added for one in self._sums)
        for one in self._sums:
            one._sum(is_backward)

    @torch.no_grad()
    def _sum(self, is_backward: bool) -> None:
        fresh = {place: grad for place, grad in self._fresh.items() if place in self._added}
        before = self._before
        self._fresh, self._before, self._added = {}, {}, set()
        if not is_backward:
            return
        pending = []
        for places in self._buckets():
            flat = self._flatten(places, fresh)
            with collective(self._operation):
                work = dist.all_reduce(flat, group=self._group, async_op=True)
            pending.append((places, flat, work))
        for places, flat, work in pending:
            with collective(self._operation):
                work.wait()
            self._store(places, flat, fresh, before)

    def _buckets(self) -> list[list[int]]:
        """Returns indices of parameters of one dtype, about `BUCKET_BYTES`, in a fixed order."""
        buckets: list[list[int]] = []
        size, dtype = 0, None
        for place, parameter in enumerate(self._parameters):
            nbytes = _local(parameter).nbytes
            if not buckets or parameter.dtype != dtype or size + nbytes > BUCKET_BYTES:
                buckets.append([])
                size, dtype = 0, parameter.dtype
            buckets[-1].append(place)
            size += nbytes
        return buckets

    def _flatten(self, places: list[int], fresh: dict[int, Tensor]) -> Tensor:
        """Returns all gradients, zeros for missing ones, and flags of which exist (0 or 1)."""
        first = _local(self._parameters[places[0]])
        parts = [
            _local(fresh[place]).reshape(-1)
            if place in fresh
            else first.new_zeros(_local(self._parameters[place]).numel())
            for place in places
        ]
        have = first.new_tensor([float(place in fresh) for place in places])
        return torch.cat([*parts, have])

    def _store(
        self,
        places: list[int],
        flat: Tensor,
        fresh: dict[int, Tensor],
        before: dict[int, Tensor],
    ) -> None:
        sizes = [_local(self._parameters[place]).numel() for place in places]
        *sums, have = flat.split([*sizes, len(places)])
        for place, total, count in zip(places, sums, have.tolist(), strict=True):
            if count == 0:
                continue
            parameter = self._parameters[place]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grad = _local(parameter.grad)
            if place not in fresh:  # the gradient is of earlier backwards only
                grad.add_(total.view_as(grad))
                continue
            grad.copy_(total.view_as(grad))
            if place in before:
                grad.add_(_local(before[place]))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
