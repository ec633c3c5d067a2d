"""This process among those of the run, where there are others at all."""

from __future__ import annotations

import torch.distributed as dist

from unimoe_kernels.distributed.failure import collective


def is_distributed() -> bool:
    """Whether there are process groups."""
    return dist.is_initialized()


def is_first() -> bool:
    """Whether this process writes what is written once: rank 0, or the only process."""
    return not is_distributed() or dist.get_rank() == 0


def meet(operation: str) -> None:
    """Waits until all ranks have come here; a process alone goes on.

    Raises:
        CollectiveError: If a rank dies or does not come in time.
    """
    if is_distributed():
        with collective(operation):
            dist.barrier()
