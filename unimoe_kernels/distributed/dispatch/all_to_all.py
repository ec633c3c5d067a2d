"""`all_to_all`: differentiable exchange of rows between ranks, synchronous or overlapped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from unimoe_kernels import _checks
from unimoe_kernels.distributed.dispatch.traffic import note_transfer
from unimoe_kernels.distributed.running.failure import CollectiveError, collective

Room = Callable[[Tensor], Tensor]


def all_to_all(
    rows: Tensor,
    input_splits: Sequence[int],
    output_splits: Sequence[int],
    group: dist.ProcessGroup,
) -> Tensor:
    """Sends each rank of a group its part of the rows and returns the rows received from all.

    Example:
        In each of two processes that run the same code:

        >>> if group.rank() == 0:
        ...     received = all_to_all(torch.tensor([[1], [2], [3]]), [1, 2], [1, 0], group)
        ... else:
        ...     received = all_to_all(torch.tensor([[4]]), [0, 1], [2, 1], group)
        >>> expected = [[[1]], [[2], [3], [4]]]
        >>> received.tolist() == expected[group.rank()]
        True

    Args:
        rows: `[R, ...]`, any dtype, rows for rank 0 of the group first.
        input_splits: number of rows to send to each rank; they sum to R.
        output_splits: number of rows to receive from each rank. The number that rank a expects from
            b must be the number that b sends to a; with `UNIMOE_CHECKS=1` all splits are compared
            first.
        group: the ranks, all of which must call this function.

    Returns:
        `[sum(output_splits), ...]`, rows from rank 0 first, dtype and device of `rows`.

    Raises:
        ValueError: If the splits do not match the rows or the group.
        CollectiveError: If a rank dies or exceeds the timeout, or, with `UNIMOE_CHECKS=1`, the
            splits of two ranks disagree.
        NotImplementedError: Under a `torch.func` transform or in forward-mode AD.

    Note:
        Differentiable: the gradient is sent in the reverse direction. Deterministic. Supports
        `torch.compile`, where splits are constants. Implemented by
        `torch.distributed.all_to_all_single`, with gloo for tensors on the CPU and NCCL on CUDA.
    """
    _checks.refuse_transforms("all_to_all")
    input_splits, output_splits = list(input_splits), list(output_splits)
    _check(rows, input_splits, output_splits, group)
    if _checks.reads_values(rows):
        _compare_splits(rows, input_splits, output_splits, group)
    return torch.ops.unimoe.all_to_all(
        rows.contiguous(), input_splits, output_splits, group.group_name
    )


class Transfer:
    """An asynchronous all-to-all, also in the backward.

    `start` returns a tensor that is not filled yet; `finish` waits and returns it filled.
    Computation between the two calls overlaps the transfer. So it does in the backward, where
    autograd runs them in reverse order: the backward of `finish` starts the transfer, and that of
    `start` waits.

    Args:
        input_splits: as in `all_to_all`.
        output_splits: as in `all_to_all`.
        group: as in `all_to_all`.
        operation: name of the transfer in errors.
        room: None, or a function that maps the rows sent to the receive buffer,
            `[sum(output_splits), ...]`, contiguous. None allocates a new tensor.
        grad_room: the same for the backward, `[sum(input_splits), ...]`.
    """

    def __init__(
        self,
        input_splits: list[int],
        output_splits: list[int],
        group: dist.ProcessGroup,
        operation: str,
        room: Room | None = None,
        grad_room: Room | None = None,
    ) -> None:
        self.splits = (input_splits, output_splits)
        self.group = group
        self.operation = operation
        self._rooms = (room, grad_room)
        self._work: dist.Work | None = None
        self._arriving: Tensor | None = None

    def start(self, rows: Tensor) -> Tensor:
        """Starts the transfer of rows `[R, ...]`; pass the result only to `finish`."""
        return _Start.apply(rows, self)

    def finish(self, received: Tensor) -> Tensor:
        """Waits for the transfer and returns the received rows."""
        return _Finish.apply(received, self)

    def send(self, rows: Tensor, backward: bool) -> Tensor:
        """Starts the forward or backward transfer, without recording gradients."""
        input_splits, output_splits = self.splits[::-1] if backward else self.splits
        rows = rows.contiguous()
        room = self._rooms[backward]
        if room is None:
            received = rows.new_empty((sum(output_splits), *rows.shape[1:]))
        else:
            received = room(rows)
        with collective(self._name(backward)):
            self._work = dist.all_to_all_single(
                received, rows, output_splits, input_splits, group=self.group, async_op=True
            )
        self._arriving = received
        note_transfer(rows, input_splits, output_splits, dist.get_rank(self.group))
        return received

    def wait(self, backward: bool) -> Tensor:
        """Waits for the transfer that `send` started, and returns its output."""
        work, received = self._work, self._arriving
        self._work = self._arriving = None
        with collective(self._name(backward)):
            work.wait()
        return received

    def _name(self, backward: bool) -> str:
        return f"{self.operation}, backward" if backward else self.operation


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.send(rows, backward=False)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        _checks.refuse_second_derivatives(ctx.transfer.operation)
        return ctx.transfer.wait(backward=True), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, received: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.wait(backward=False)
        return received.view_as(received)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        _checks.refuse_second_derivatives(ctx.transfer.operation)
        ctx.transfer.send(grad, backward=True)
        # Only a tensor of the shape that autograd expects: `_Start` returns the gradient.
        return grad, None


def _check(
    rows: Tensor, input_splits: list[int], output_splits: list[int], group: dist.ProcessGroup
) -> None:
    if not isinstance(rows, Tensor) or rows.dim() < 1:
        raise ValueError(f"rows ({rows!r}) must be a tensor of shape [R, ...]")
    for name, splits in (("input_splits", input_splits), ("output_splits", output_splits)):
        if len(splits) != group.size():
            raise ValueError(
                f"{name} ({splits}) must have one number for each of the {group.size()} ranks"
            )
        if any(size < 0 for size in splits):
            raise ValueError(f"{name} ({splits}) must not be negative")
    if sum(input_splits) != rows.shape[0]:
        raise ValueError(f"input_splits ({input_splits}) must add up to R = {rows.shape[0]}")


def _compare_splits(
    rows: Tensor, input_splits: list[int], output_splits: list[int], group: dist.ProcessGroup
) -> None:
    """Compares the splits of all ranks on every rank, so that all raise and none waits."""
    own = torch.tensor([input_splits, output_splits], device=rows.device)
    found = own.new_empty(group.size(), *own.shape)
    with collective("all_to_all of splits"):
        dist.all_gather(list(found.unbind()), own, group=group)
    sent, expected = found[:, 0].cpu(), found[:, 1].cpu().t()
    for source, target in (sent != expected).nonzero().tolist():
        ranks = [dist.get_global_rank(group, rank) for rank in (source, target)]
        raise CollectiveError(
            "all_to_all",
            f"rank {ranks[0]} sends {sent[source, target]} rows to rank {ranks[1]}, which expects"
            f" {expected[source, target]} in its output_splits",
        )


def _all_to_all(rows, input_splits, output_splits, group):
    transfer = Transfer(
        list(input_splits), list(output_splits), _resolve_process_group(group), "all_to_all"
    )
    transfer.send(rows, backward=False)
    return transfer.wait(backward=False)


def _fake(rows, input_splits, output_splits, group):
    return rows.new_empty((sum(output_splits), *rows.shape[1:]))


def _setup_context(ctx, inputs, output):
    _, ctx.input_splits, ctx.output_splits, ctx.group = inputs


def _backward(ctx, grad):
    rows = torch.ops.unimoe.all_to_all(
        grad.contiguous(), ctx.output_splits, ctx.input_splits, ctx.group
    )
    return rows, None, None, None


_library = torch.library.Library("unimoe", "FRAGMENT")
_library.define(
    "all_to_all(Tensor rows, SymInt[] input_splits, SymInt[] output_splits, str group) -> Tensor"
)
_library.impl("all_to_all", _all_to_all, "CompositeExplicitAutograd")
torch.library.register_fake("unimoe::all_to_all", _fake, lib=_library)
torch.library.register_autograd(
    "unimoe::all_to_all", _backward, setup_context=_setup_context, lib=_library
)
