"""One safetensors file from and to a model whose weights lie on several ranks."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from unimoe_kernels.distributed.failure import collective
from unimoe_kernels.distributed.world import is_first, meet


@torch.no_grad()
def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All weights in one piece, on the CPU of rank 0; other ranks get an empty dictionary.

    Every rank calls it. Weights are put together one after the other.
    """
    found = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, DTensor):
            with collective(f"gathering {name}"):
                tensor = tensor.full_tensor()
        if is_first():
            found[name] = tensor.detach().cpu().contiguous()
    return found


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Writes all weights to one safetensors file, under the names of `model.state_dict()`.

    Every rank calls it; rank 0 writes, under another name first. Weights that share their memory,
    such as tied embeddings, are written once.

    Raises:
        CollectiveError: If a rank dies or does not come in time.
    """
    from safetensors.torch import save_file

    path = Path(path)
    weights = whole_state_dict(model)
    if is_first():
        places = {}
        for name, tensor in model.state_dict().items():
            places.setdefault(_place(name, tensor), name)
        kept = {name: weights[name] for name in places.values()}
        partial = path.with_name(path.name + ".new")
        save_file(kept, partial, metadata={"format": "pt"})
        os.replace(partial, path)
    meet(f"save of {path}")


@torch.no_grad()
def load_weights(model: nn.Module, path: str | Path) -> None:
    """Reads one safetensors file into a model; each rank keeps its parts, one tensor at a time.

    Raises:
        ValueError: If the file cannot be read, or its names or shapes are not those of the model.
            Then nothing is changed.
    """
    from safetensors import SafetensorError, safe_open

    state = model.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            _check(path, state, shapes)
            for name in shapes:
                target, whole = state[name], file.get_tensor(name)
                if isinstance(target, DTensor):
                    whole = whole.to(target.device)
                    mesh, placements = target.device_mesh, target.placements
                    whole = distribute_tensor(whole, mesh, placements, src_data_rank=None)
                    target, whole = target.to_local(), whole.to_local()
                target.copy_(whole)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"weights ({path}) cannot be read: {error}") from error


def _check(path: str | Path, state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    unexpected = sorted(shapes.keys() - state.keys())
    # A weight that shares its memory with one in the file is read with it.
    read = {_place(name, state[name]) for name in shapes.keys() & state.keys()}
    missing = sorted(name for name, tensor in state.items() if _place(name, tensor) not in read)
    if missing or unexpected:
        raise ValueError(
            f"weights ({path}) are of another model: missing {missing[:3]}, unexpected"
            f" {unexpected[:3]}"
        )
    for name, shape in shapes.items():
        if shape != tuple(state[name].shape):
            raise ValueError(
                f"weights ({path}) have {name} of shape {shape}, the model of shape"
                f" {tuple(state[name].shape)}"
            )


def _place(name: str, tensor: Tensor) -> tuple:
    """Where a tensor lies in memory; a part without numbers has no place but its name."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return (local.data_ptr() or name, tensor.shape)
