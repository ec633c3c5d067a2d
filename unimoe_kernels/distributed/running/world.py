"""Rank of this process, and synchronisation with the other processes of a run, if any."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from unimoe_kernels.distributed.running.failure import CollectiveError, collective


def is_distributed() -> bool:
    """Returns whether process groups are initialised."""
    return dist.is_initialized()


def is_first() -> bool:
    """Returns whether this is rank 0 or the only process, which writes output files."""
    return not is_distributed() or dist.get_rank() == 0


def meet(operation: str) -> None:
    """Waits until all ranks have called this function; returns at once in a single process.

    Raises:
        CollectiveError: If a rank dies or exceeds the timeout.
    """
    if is_distributed():
        with collective(operation):
            dist.barrier()


def write_once(operation: str, write: Callable[[], None]) -> None:
    """Runs a function on rank 0; returns on all ranks once it is done, or raises on all of them.

    Raises:
        CollectiveError: On the other ranks if the function raises on rank 0, or if a rank dies or
            exceeds the timeout.
    """
    failure = None
    if is_first():
        try:
            write()
        except Exception as error:
            failure = error
    if is_distributed():
        told = [None if failure is None else f"{type(failure).__name__}: {failure}"]
        with collective(operation):
            dist.broadcast_object_list(told, src=0)
        if told[0] is not None and failure is None:
            raise CollectiveError(operation, f"rank 0 could not write: {told[0]}")
    if failure is not None:
        raise failure
