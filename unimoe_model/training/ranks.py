"""What a stage does differently when several processes train one model."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from unimoe_kernels.distributed import (
    clip_grad_norm,
    collective,
    count_over_ranks,
    parallelize_moe,
    unparallelize_moe,
)

Item = TypeVar("Item")


class Ranks:
    """The processes that train one model together; without a mesh, one alone.

    Attributes:
        rank: number of this process.
        world_size: number of processes.
    """

    def __init__(self, mesh: DeviceMesh | None = None):
        self._mesh = mesh
        self.rank = 0 if mesh is None else dist.get_rank()
        self.world_size = 1 if mesh is None else mesh.size()

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, batch: Sequence[Item]) -> Sequence[Item]:
        """This process's examples of a batch of all.

        Raises:
            ValueError: If the batch has fewer examples than there are processes.
        """
        if len(batch) < self.world_size:
            raise ValueError(
                f"batch_size ({len(batch)}) must be at least the number of processes"
                f" ({self.world_size})"
            )
        return batch[self.rank :: self.world_size]

    def divide(self, model: nn.Module, parameters: dict[str, nn.Parameter]):
        """Splits the experts of a model whose trained parameters require gradients.

        Returns:
            The trained parameters by name; those of experts are others than before.
        """
        if self._mesh is None:
            return parameters
        return _of(parallelize_moe(model, self._mesh), parameters)

    def unite(self, model: nn.Module, parameters: dict[str, nn.Parameter]):
        """Puts the experts together again; returns the trained parameters by name."""
        if self._mesh is None:
            return parameters
        return _of(unparallelize_moe(model), parameters)

    def count(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Adds up a number of answer tokens over all processes; None alone."""
        return None if self._mesh is None else count_over_ranks(tokens, self._mesh)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> None:
        """Scales gradients down to a norm."""
        if self._mesh is None:
            nn.utils.clip_grad_norm_(parameters, max_norm)
        else:
            clip_grad_norm(parameters, max_norm)

    def sums(self, operation: str, *numbers: float) -> list[float]:
        """Adds up numbers over all processes."""
        if self._mesh is None:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        with collective(operation):
            dist.all_reduce(total)
        return total.tolist()

    def wait(self, operation: str) -> None:
        """Waits for all processes."""
        # An all-reduce of an empty tensor returns at once.
        self.sums(operation, 0.0)


def _of(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    found = dict(model.named_parameters())
    return {name: found[name] for name in parameters}
