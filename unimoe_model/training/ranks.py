"""Distribution of a stage over processes."""

import copy
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method

from unimoe_kernels.distributed import (
    clip_grad_norm,
    collective,
    count_over_ranks,
    parallelize_moe,
    unparallelize_moe,
    whole_state_dict,
)
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.training.used_modules import UsedModules

Item = TypeVar("Item")


class Ranks:
    """The processes that train one model together; a single process without a mesh.

    Args:
        mesh: device mesh of the processes.
        shard: whether all weights are sharded, and not only the experts.

    Attributes:
        rank: rank of this process.
        world_size: number of processes.
    """

    def __init__(self, mesh: DeviceMesh | None = None, shard: bool = False):
        self._mesh = mesh
        self._shard = shard
        self._used: UsedModules | None = None
        self._skeleton: UniMoEForConditionalGeneration | None = None
        self.rank = 0 if mesh is None else dist.get_rank()
        self.world_size = 1 if mesh is None else mesh.size()

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, batch: Sequence[Item]) -> Sequence[Item]:
        """This process's share of a batch.

        Raises:
            ValueError: If the batch has fewer samples than there are processes.
        """
        if len(batch) < self.world_size:
            raise ValueError(
                f"batch_size ({len(batch)}) must be at least the number of processes"
                f" ({self.world_size})"
            )
        return batch[self.rank :: self.world_size]

    @property
    def is_single(self) -> bool:
        """Whether the run has no mesh of processes."""
        return self._mesh is None

    def divide(self, model: nn.Module, parameters: dict[str, nn.Parameter]):
        """Distributes a model, whose trained parameters require gradients, by `parallelize_moe`.

        Args:
            model: the model, changed in place.
            parameters: trained parameters by name.

        Returns:
            The trained parameters by name; distributed ones are new objects.
        """
        if self._mesh is None:
            return parameters
        if self._shard:
            self._divide_all(model)
        else:
            parallelize_moe(model, self._mesh)
        found = dict(model.named_parameters())
        return {name: found[name] for name in parameters}

    def _divide_all(self, model: UniMoEForConditionalGeneration) -> None:
        self._skeleton = _without_weights(model)
        connectors = [part for name, part in model.model.named_children() if "connector" in name]
        self._used = UsedModules(connectors)
        layers = model.model.language_model.layers
        parallelize_moe(model, self._mesh, data="shard", units=layers)
        register_fsdp_forward_method(model, "hidden_states")
        # Each backward gathers every layer on all processes, even if this process's samples do not
        # use a trained part, such as a connector.
        model.get_input_embeddings().register_forward_hook(_require_gradient)

    def unite(self, model: nn.Module) -> nn.Module:
        """Returns a model with whole weights, which are valid only on the first process."""
        if self._mesh is None:
            return model
        if not self._shard:
            return unparallelize_moe(model)
        weights, skeleton = whole_state_dict(model), self._skeleton
        self._used = self._skeleton = None
        if self.is_first:
            skeleton.load_state_dict(weights, assign=True)
            skeleton.tie_weights()
        return skeleton

    def count(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Sums a number of labelled tokens over all processes; None for a single process."""
        return None if self._mesh is None else count_over_ranks(tokens, self._mesh)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> None:
        """Clips the norm of gradients, after dropping those of parameters that no process used."""
        if self._used is not None:
            self._used.drop_other_gradients()
        if self._mesh is None:
            nn.utils.clip_grad_norm_(parameters, max_norm)
        else:
            clip_grad_norm(parameters, max_norm)

    def sums(self, operation: str, *numbers: float) -> list[float]:
        """Sums numbers over all processes; `operation` names the collective in errors."""
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


def _without_weights(model: UniMoEForConditionalGeneration) -> UniMoEForConditionalGeneration:
    """A copy of a model with its parameters on the meta device."""
    memo = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


def _require_gradient(_: nn.Module, __: tuple, embeddings: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        embeddings.requires_grad_()
