"""Start of distributed runs, from the recipe and the environment of torchrun."""

import os
from dataclasses import asdict, replace

import torch
from torch.distributed.device_mesh import DeviceMesh

from unimoe_kernels.distributed import start_parallel
from unimoe_model.precision import resolve_precision
from unimoe_model.training.checkpoint import fingerprint
from unimoe_model.training.recipe import Parallel, Recipe


def own_device() -> torch.device:
    """The GPU of torchrun's local rank, the first GPU without torchrun, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def start_ranks(recipe: Recipe, device: torch.device) -> DeviceMesh | None:
    """Builds the mesh of a run started by torchrun; None for a single process.

    Without `parallel` in the recipe, the run is data parallel over all processes.

    Raises:
        ValueError: If the recipe's number of processes differs from that of torchrun, or a stage
            requires a single process.
        RuntimeError: If a process times out, or has another recipe.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    parallel = recipe.parallel or Parallel(data=processes)
    wanted = parallel.data * parallel.expert
    if wanted != processes:
        raise ValueError(
            f"{recipe.path}: parallel (data {parallel.data}, expert {parallel.expert}) requires"
            f" {wanted} processes, and there {'is' if processes == 1 else 'are'} {processes}: start"
            f" with torchrun --nproc-per-node {wanted} -m unimoe_model.cli train ..."
        )
    replace(recipe, parallel=parallel)  # raises if a stage requires a single process
    if "RANK" not in os.environ:
        return None
    precision = resolve_precision(recipe.precision, device)
    return start_parallel(
        parallel.data,
        parallel.expert,
        device=device,
        timeout=parallel.timeout,
        fingerprint=fingerprint([asdict(recipe), precision]),
    )


def share_experts() -> DeviceMesh | None:
    """A mesh that splits experts over all processes of torchrun; None for a single process.

    Raises:
        RuntimeError: If a process times out.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return start_parallel(1, processes, device=own_device()) if processes > 1 else None
