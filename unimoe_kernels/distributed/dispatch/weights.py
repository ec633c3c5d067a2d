"""Saving and loading safetensors files of a model that is distributed over ranks."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from unimoe_kernels._files import atomic_write
from unimoe_kernels.distributed.running.failure import collective
from unimoe_kernels.distributed.running.world import is_first, write_once
from unimoe_kernels.layers.expert_lora import refresh_lora


@torch.no_grad()
def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns all full weights on the CPU of rank 0, and an empty dictionary on other ranks.

    Every rank must call this function. Weights are gathered one by one.
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

    Every rank must call this function; rank 0 writes the file atomically. Weights that share
    memory, such as tied embeddings, are written once.

    Raises:
        CollectiveError: If a rank dies or exceeds the timeout.
    """
    from safetensors.torch import save_file

    path = Path(path)
    weights = whole_state_dict(model)

    def write() -> None:
        places = {}
        for name, tensor in model.state_dict().items():
            places.setdefault(_place(name, tensor), name)
        kept = {name: weights[name] for name in places.values()}
        with atomic_write(path) as partial:
            save_file(kept, partial, metadata={"format": "pt"})

    write_once(f"save of {path}", write)


@torch.no_grad()
def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads weights into a model; each rank reads only its own experts, tensor by tensor.

    Args:
        model: a model before or after `parallelize_moe`.
        path: a safetensors file, or a folder with `model.safetensors` or with the files listed in
            `model.safetensors.index.json`, as saved by transformers.

    Raises:
        ValueError: If a file cannot be read, or names or shapes differ from those of the model.
            Nothing is changed in this case.
    """
    from safetensors import SafetensorError, safe_open

    state, path = model.state_dict(), Path(path)
    try:
        with ExitStack() as opened:
            sources: dict[str, Any] = {}
            for file_path in _files(path):
                file = opened.enter_context(safe_open(file_path, framework="pt"))
                sources |= dict.fromkeys(file.keys(), file)
            shapes = {
                name: tuple(file.get_slice(name).get_shape()) for name, file in sources.items()
            }
            _check(path, state, shapes)
            for name, file in sources.items():
                _read(file, name, state[name])
            refresh_lora(model)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"weights ({path}) cannot be read: {error}") from error


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return [path / "model.safetensors"]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"weights ({index}) must be an index of safetensors files") from error
    # An index may list only files in its own folder; any other path is rejected.
    if any(Path(str(name)).name != name for name in names):
        raise ValueError(f"weights ({index}) must name files of its own folder, not {names}")
    return [path / name for name in sorted(names)]


def _read(file: Any, name: str, target: Tensor) -> None:
    """Copies a tensor, or this rank's part of it, from an open file."""
    if not isinstance(target, DTensor):
        target.copy_(file.get_tensor(name))
        return
    local, mesh, placements = target.to_local(), target.device_mesh, target.placements
    ranks, rows = mesh.size(), target.shape[0]
    if mesh.ndim == 1 and placements[0].is_shard(0) and rows % ranks == 0:
        first = mesh.get_local_rank() * (rows // ranks)
        local.copy_(file.get_slice(name)[first : first + rows // ranks])
        return
    whole = file.get_tensor(name).to(target.device)
    local.copy_(distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local())


def _check(path: str | Path, state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    unexpected = sorted(shapes.keys() - state.keys())
    # A weight that shares memory with one in the file need not be in the file.
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
    """Returns a key of a tensor's memory; an empty part is identified by its name."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return (local.data_ptr() or name, tensor.shape)
