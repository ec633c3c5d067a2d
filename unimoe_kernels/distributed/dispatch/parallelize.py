"""Distributes the experts of a model over ranks and replicates or shards everything else."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from unimoe_kernels.distributed.dispatch.dispatcher import ExpertDispatcher
from unimoe_kernels.distributed.dispatch.replicate import GradientSum
from unimoe_kernels.distributed.running.failure import CollectiveError, collective
from unimoe_kernels.distributed.running.start import MESH_DIMS
from unimoe_kernels.layers import GroupedExperts, MoE, QuantizedExperts
from unimoe_kernels.layers.expert_lora import refresh_lora
from unimoe_kernels.layers.quantized_projection import QuantizedProjection

DATA_MODES = ("replicate", "shard")

# Hooks that `unparallelize_moe` has to remove, by model.
_gradient_sums: WeakKeyDictionary[nn.Module, list[GradientSum]] = WeakKeyDictionary()


def parallelize_moe(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    data: str = "replicate",
    units: Iterable[nn.Module] | None = None,
    num_chunks: int = 1,
    max_rows: int | None = None,
) -> nn.Module:
    """Parallelises a model over `dp x ep` ranks, each of which processes its own samples.

    The experts of every `MoE` are sharded over `ep`: their weights become DTensors, sharded in
    dimension 0, and rows are sent to them (`ExpertDispatcher`). Routers, shared experts and all
    other modules are data parallel over all ranks; experts are data parallel over `dp`. Weights are
    broadcast from the first rank.

    Build a model that is too large for one rank `with torch.device("meta")`. Each rank then
    allocates only its own parts, which are uninitialised until `load_weights` or `load_sharded`
    fills them.

    Gradients are summed, not averaged: every rank must divide its loss by the number of supervised
    tokens of all ranks (`count_over_ranks`), so that the losses of all ranks sum to the loss of one
    process. Auxiliary losses are already such shares (`TopKRouter.sum_over_ranks`) and are added
    unchanged. All gradients then equal those of one process. So does the routing, unless the router
    has a `capacity_factor`, which applies to the tokens of each rank separately.

    Afterwards, clip gradients with `clip_grad_norm` and pass `parameter_groups` to optimisers. Add
    LoRA, and set which parameters require gradients, before calling this function.

    Args:
        model: the model, changed in place. Without any `MoE` it is only data parallel.
        mesh: mesh of `start_parallel`, or any mesh with dimensions `("dp", "ep")`.
        data: `"replicate"` keeps a full copy of all parameters except experts on every rank and
            sums gradients after the backward. `"shard"` shards everything with FSDP2: experts over
            `dp`, all others over all ranks, unit by unit. Every rank must then use the same units.
        units: with `"shard"`, modules whose parameters are gathered together, such as decoder
            layers; None is the members of each `ModuleList` that contains an `MoE`. Parameters
            outside of units are gathered at once.
        num_chunks: see `ExpertDispatcher`.
        max_rows: see `ExpertDispatcher`.

    Returns:
        The same model.

    Raises:
        ValueError: If the mesh has other dimensions, data is unknown, E is not a multiple of `ep`,
            experts are already parallel, a non-persistent buffer is on the meta device, or FSDP2
            cannot shard an expert: unevenly, or quantised. Nothing is changed in this case.
        CollectiveError: If names, shapes or dtypes of parameters, or which of them require
            gradients, differ between ranks. Nothing is changed in this case.
    """
    if mesh.mesh_dim_names != MESH_DIMS:
        raise ValueError(f"mesh (dimensions {mesh.mesh_dim_names}) must have {MESH_DIMS}")
    if data not in DATA_MODES:
        raise ValueError(f"data ({data!r}) must be one of {DATA_MODES}")
    layers = [(name, part) for name, part in model.named_modules() if isinstance(part, MoE)]
    dispatchers = [_dispatcher(name, moe, mesh, num_chunks, max_rows) for name, moe in layers]
    everyone = _everyone(mesh)
    _check_buffers(model)
    if data == "shard":
        for name, moe in layers:
            _refuse_quantized(name, moe)
            for parameter in moe.experts.parameters():
                _placement(parameter, mesh.size(0))
    _check_same(model, mesh, everyone)
    _broadcast(model, everyone)
    for (name, moe), dispatcher in zip(layers, dispatchers, strict=True):
        _split_experts(moe.experts, mesh)
        moe.experts.dispatcher = dispatcher
        if moe.load_balancing_coef > 0 or moe.router_z_coef > 0:
            moe.router.sum_over_ranks = _Sum(everyone, f"auxiliary losses of {name}")
    _materialise(model, mesh.device_type)
    if data == "shard":
        chosen = _units(model) if units is None else units
        _shard(model, [moe.experts for _, moe in layers], chosen, mesh, everyone)
    else:
        _replicate(model, mesh, everyone)
    return model


@torch.no_grad()
def unparallelize_moe(model: nn.Module) -> nn.Module:
    """Gathers all experts on every rank, undoing `parallelize_moe`.

    Every rank must call this function and have enough memory for all experts. Gradients are
    discarded.

    Args:
        model: a model parallelised with `data="replicate"`; changed in place.

    Returns:
        The same model.

    Raises:
        ValueError: If the model was not parallelised in this way.
        CollectiveError: If a rank dies or exceeds the timeout.
    """
    if model not in _gradient_sums:
        raise ValueError(
            f"model ({type(model).__name__}) must be one of parallelize_moe with data='replicate'"
        )
    for gradient_sum in _gradient_sums.pop(model):
        gradient_sum.remove()
    model.zero_grad(set_to_none=True)
    for path, moe in model.named_modules():
        if not isinstance(moe, MoE):
            continue
        for part in moe.experts.modules():
            for name, parameter in part.named_parameters(recurse=False):
                with collective(f"gathering {name} of {path}"):
                    whole = nn.Parameter(parameter.full_tensor(), parameter.requires_grad)
                part.register_parameter(name, whole)
            for name, buffer in part.named_buffers(recurse=False):
                if isinstance(buffer, DTensor):
                    with collective(f"gathering {name} of {path}"):
                        setattr(part, name, buffer.full_tensor())
        moe.experts.dispatcher = moe.router.sum_over_ranks = None
    return model


def parameter_groups(
    parameters: Iterable[nn.Parameter],
) -> list[dict[str, list[nn.Parameter]]]:
    """Returns parameter groups for an optimiser: plain tensors, and DTensors of each mesh.

    torch's fused and foreach optimisers do not support both in one group. Parameters that do not
    require gradients are omitted; those of a model that is not parallel are one group.
    """
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault(mesh, []).append(parameter)
    return [{"params": parameters} for parameters in groups.values()]


def count_over_ranks(count: Tensor, mesh: DeviceMesh) -> Tensor:
    """Sums a count over all ranks, for use as the divisor of each rank's loss.

    Args:
        count: `()`, integer, such as the number of supervised tokens on this rank.
        mesh: mesh with dimensions `("dp", "ep")`; every rank must call this function.

    Returns:
        `()`, the sum, at least 1.
    """
    return _Sum(_everyone(mesh), "count of supervised tokens")(count).clamp(min=1)


class _Sum:
    """Sums integers over a group."""

    def __init__(self, group: dist.ProcessGroup, operation: str) -> None:
        self._group = group
        self._operation = operation

    @torch.compiler.disable
    def __call__(self, counts: Tensor) -> Tensor:
        counts = counts.detach().clone()
        with collective(self._operation):
            dist.all_reduce(counts, group=self._group)
        return counts


def _dispatcher(
    name: str, moe: MoE, mesh: DeviceMesh, num_chunks: int, max_rows: int | None
) -> ExpertDispatcher:
    name = f"{name}.experts" if name else "experts"
    if moe.experts.dispatcher is not None:
        raise ValueError(f"{name} must not be parallel already")
    group, num_experts = mesh.get_group("ep"), moe.experts.num_experts
    return ExpertDispatcher(group, num_experts, name, num_chunks, max_rows)


def _refuse_quantized(name: str, moe: MoE) -> None:
    if isinstance(moe.experts, QuantizedExperts):
        path = f"{name}.experts" if name else "experts"
        raise ValueError(
            f"data ('shard') must be 'replicate' where {path} are quantised "
            f"({moe.experts.format}): FSDP2 shards parameters, and their weights are buffers"
        )


def _everyone(mesh: DeviceMesh) -> dist.ProcessGroup:
    if mesh.size() != dist.get_world_size():
        raise ValueError(
            f"mesh (of {mesh.size()} ranks) must hold all {dist.get_world_size()} processes"
        )
    return dist.group.WORLD


def _check_same(model: nn.Module, mesh: DeviceMesh, group: dist.ProcessGroup) -> None:
    facts = [
        (name, tuple(t.shape), str(t.dtype), t.is_meta, t.requires_grad)
        for name, t in _tensors(model)
    ]
    own = torch.tensor([zlib.crc32(repr(facts).encode()), len(facts)], device=mesh.device_type)
    found = own.new_empty(group.size(), own.numel())
    with collective("start, comparing models"):
        dist.all_gather(list(found.unbind()), own, group=group)
    others = (found != own).any(dim=1).nonzero().flatten().tolist()
    if others:
        raise CollectiveError(
            "start",
            f"rank {others[0]} has another model, or other parameters of it require gradients",
        )


def _check_buffers(model: nn.Module) -> None:
    for path, part in model.named_modules():
        for name in sorted(part._non_persistent_buffers_set):
            buffer = getattr(part, name)
            if buffer is not None and buffer.is_meta:
                raise ValueError(
                    f"buffer {path}.{name} is on the meta device, and no checkpoint fills it"
                )


@torch.no_grad()
def _materialise(model: nn.Module, device_type: str) -> None:
    """Allocates tensors that are on the meta device; of experts, only this rank's part."""
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    fresh: dict[nn.Parameter, nn.Parameter] = {}
    for part in model.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            if parameter not in fresh:
                fresh[parameter] = nn.Parameter(_room(parameter, device), parameter.requires_grad)
            part.register_parameter(name, fresh[parameter])
        for name, buffer in list(part.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(part, name, _room(buffer, device))


def _room(tensor: Tensor, device: torch.device) -> Tensor:
    """Memory for what a rank holds of a tensor."""
    room = torch.empty_like(_local_part(tensor), device=device)
    if isinstance(tensor, DTensor):
        return DTensor.from_local(room, tensor.device_mesh, tensor.placements)
    return room


def _local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _broadcast(model: nn.Module, group: dist.ProcessGroup) -> None:
    for name, tensor in _tensors(model):
        if tensor.is_meta:
            continue
        with collective(f"start, weights of {name}"):
            dist.broadcast(tensor.detach(), src=0, group=group)
    refresh_lora(model)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _split_experts(experts: GroupedExperts, mesh: DeviceMesh) -> None:
    for part in experts.modules():
        for name, parameter in part.named_parameters(recurse=False):
            split = nn.Parameter(_split(parameter.detach(), mesh), parameter.requires_grad)
            part.register_parameter(name, split)
        if isinstance(part, QuantizedProjection):
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, _split(buffer, mesh))


def _split(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    return distribute_tensor(tensor, mesh["ep"], [Shard(0)], src_data_rank=None)


def _replicate(model: nn.Module, mesh: DeviceMesh, everyone: dist.ProcessGroup) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    experts = [p for p in trained if isinstance(p, DTensor)]
    others = [p for p in trained if not isinstance(p, DTensor)]
    sums = _gradient_sums[model] = []
    if mesh.size() > 1:
        GradientSum(others, everyone, "sum of gradients", sums)
    if mesh.size(0) > 1:
        GradientSum(experts, mesh.get_group("dp"), "sum of gradients of experts", sums)


def _shard(
    model: nn.Module,
    experts: list[GroupedExperts],
    units: Iterable[nn.Module],
    mesh: DeviceMesh,
    everyone: dist.ProcessGroup,
) -> None:
    whole_mesh = DeviceMesh.from_group(everyone, mesh.device_type, mesh_dim_names=("world",))
    ranks = mesh.size(0)
    for part in experts:
        fully_shard(
            part,
            mesh=mesh["dp"],
            shard_placement_fn=lambda parameter: _placement(parameter, ranks),
        )
    for unit in [*units, model]:
        if not isinstance(unit, FSDPModule):
            fully_shard(unit, mesh=whole_mesh)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            # By default FSDP2 averages gradients, which gloo would sum.
            part.set_force_sum_reduction_for_comms(True)
    if hasattr(model, "set_reduce_scatter_unused_params"):
        model.set_reduce_scatter_unused_params(True)


def _placement(parameter: Tensor, ranks: int) -> Shard:
    """Returns a dimension other than 0 of an expert parameter that the ranks divide evenly."""
    for dim in range(1, parameter.dim()):
        if parameter.shape[dim] % ranks == 0:
            return Shard(dim)
    raise ValueError(
        f"an expert parameter of shape {tuple(parameter.shape)} must have a dimension after the"
        f" first that is a multiple of the {ranks} ranks of dp, to be sharded"
    )


def _units(model: nn.Module) -> Iterator[nn.Module]:
    for part in model.modules():
        if isinstance(part, nn.ModuleList) and any(isinstance(m, MoE) for m in part.modules()):
            yield from part
