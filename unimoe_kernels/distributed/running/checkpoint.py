"""Sharded checkpoints of a training run that load with any number of ranks."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from unimoe_kernels._files import recover_folder, replace_folder
from unimoe_kernels.distributed.running.failure import collective
from unimoe_kernels.distributed.running.world import is_distributed, is_first, meet

_EXTRA = "extra.json"


def save_sharded(
    folder: str | Path,
    model: nn.Module | Mapping[str, Tensor],
    optimizers: Sequence[Optimizer] = (),
    extra: dict[str, Any] | None = None,
) -> None:
    """Saves a checkpoint atomically: if interrupted, either the old or the new one remains.

    Every rank writes its own parts, in the format of `torch.distributed.checkpoint`. All ranks must
    call this function, and hosts must share the file system. It also works in one process without
    process groups.

    Args:
        folder: folder of the checkpoint; the same names with `.new` and `.old` appended are used
            temporarily.
        model: a model, whose state dict is saved, or tensors by name. Plain tensors must be equal
            on all ranks.
        optimizers: optimisers whose states are saved, by parameter name. Hyperparameters are not
            saved.
        extra: additional data, saved as JSON; only that of rank 0 is used.

    Raises:
        ValueError: If an optimiser has a parameter that is not in the model.
        CollectiveError: If a rank dies or exceeds the timeout; nothing is replaced in this case.
    """
    folder = Path(folder)
    state = _model_state(model) | _optimizer_state(model, optimizers)
    fresh = _fresh(folder)
    if is_first():
        recover_folder(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        (fresh / _EXTRA).write_text(json.dumps(extra or {}), encoding="utf-8")
    meet(f"save of {folder}")
    with collective(f"save of {folder}"), _alone_on_purpose():
        dcp.save(state, storage_writer=dcp.FileSystemWriter(fresh), no_dist=not is_distributed())
    if is_first():
        replace_folder(folder, fresh)
    meet(f"save of {folder}, end")


def load_sharded(
    folder: str | Path,
    model: nn.Module | Mapping[str, Tensor],
    optimizers: Sequence[Optimizer] = (),
    check: Callable[[dict[str, Any]], None] = lambda extra: None,
) -> dict[str, Any] | None:
    """Loads a checkpoint of `save_sharded`, written by any number of ranks.

    Every rank reads its own parts, bit for bit; a parameter may be sharded now and not when it was
    saved, or vice versa. The index file is a pickle, of which only the description of tensors is
    unpickled.

    Args:
        folder: folder of the checkpoint.
        model: a model, whose parameters and buffers are overwritten, or tensors by name.
        optimizers: as many optimisers as were saved, with parameters of the same names; their
            states are replaced.
        check: function that is called with the saved `extra` before anything is overwritten; raises
            an error if the checkpoint must not be loaded.

    Returns:
        The saved `extra`, or None if there is no checkpoint, in which case nothing is changed.

    Raises:
        ValueError: If the checkpoint cannot be read, or its parameters or optimisers differ.
            Nothing is changed in this case.
        CollectiveError: If a rank dies or exceeds the timeout.
    """
    folder = Path(folder)
    if is_first():
        recover_folder(folder)
    meet(f"load of {folder}")
    if not folder.exists():
        return None
    try:
        reader = _Reader(folder)
        metadata = reader.read_metadata()
        extra = json.loads((folder / _EXTRA).read_text(encoding="utf-8"))
        _check_files(folder, metadata)
    except Exception as error:
        raise ValueError(f"checkpoint {folder} cannot be read: {error}") from error
    check(extra)
    entries = metadata.state_dict_metadata
    state = _model_state(model)
    _check_entries(folder, state, entries, len(optimizers))
    fresh = _empty_optimizer_state(folder, model, optimizers, entries)
    targets = state | {key: tensor for key, (_, _, _, tensor) in fresh.items()}
    with collective(f"load of {folder}"), _alone_on_purpose():
        dcp.load(targets, storage_reader=reader, no_dist=not is_distributed())
    meet(f"load of {folder}")
    for module in model.modules() if isinstance(model, nn.Module) else ():
        # Of modules that keep in Python what a buffer holds, such as LoRA of experts.
        if hasattr(module, "unimoe_after_load"):
            module.unimoe_after_load()
    for optimizer in optimizers:
        optimizer.state.clear()
    for optimizer, parameter, key, tensor in fresh.values():
        optimizer.state[parameter][key] = tensor
    return extra


def discard_sharded(folder: str | Path) -> None:
    """Removes a checkpoint; all ranks must call this function."""
    folder = Path(folder)
    if is_first():
        recover_folder(folder)
        for path in (folder, _fresh(folder)):
            shutil.rmtree(path, ignore_errors=True)
    meet(f"removal of {folder}")


@contextmanager
def _alone_on_purpose() -> Iterator[None]:
    """Suppresses torch's warning about a single process without process groups."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


class _Reader(dcp.FileSystemReader):
    """Reads the index without executing arbitrary code of a pickle."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise pickle.UnpicklingError(f"{key} is not a tensor")
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    _ALLOWED = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("pathlib", "PosixPath"),
            *(
                ("torch.distributed.checkpoint.metadata", name)
                for name in (
                    "ChunkStorageMetadata",
                    "Metadata",
                    "MetadataIndex",
                    "StorageMeta",
                    "TensorProperties",
                    "TensorStorageMetadata",
                    "_MEM_FORMAT_ENCODING",
                )
            ),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint")
        return super().find_class(module, name)


def _model_state(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    return {f"model.{name}": tensor.detach() for name, tensor in tensors.items()}


def _parameters(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(model.named_parameters() if isinstance(model, nn.Module) else model)


def _optimizer_state(
    model: nn.Module | Mapping[str, Tensor], optimizers: Sequence[Optimizer]
) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in _parameters(model).items()}
    state = {}
    for number, optimizer in enumerate(optimizers):
        for parameter, values in optimizer.state.items():
            if parameter not in names:
                raise ValueError(
                    f"optimizers[{number}] holds a parameter of shape {tuple(parameter.shape)} that"
                    " is not in the model"
                )
            for key, value in values.items():
                state[f"optimizer.{number}.{key}.{names[parameter]}"] = torch.as_tensor(value)
    return state


def _check_files(folder: Path, metadata: Metadata) -> None:
    """Raises ValueError if a file of tensors is missing or truncated."""
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        end = place.offset + place.length
        ends[place.relative_path] = max(end, ends.get(place.relative_path, 0))
    for name, end in ends.items():
        size = (folder / name).stat().st_size
        if size < end:
            raise ValueError(f"{name} is truncated: {size} bytes of {end}")


def _check_entries(
    folder: Path, state: dict[str, Tensor], entries: dict[str, Any], num_optimizers: int
) -> None:
    saved = {key: entry for key, entry in entries.items() if key.startswith("model.")}
    missing, unexpected = sorted(state.keys() - saved.keys()), sorted(saved.keys() - state.keys())
    if missing or unexpected:
        raise ValueError(
            f"checkpoint {folder} is of another model: it lacks {missing[:3]} and has"
            f" {unexpected[:3]} besides"
        )
    for key, tensor in state.items():
        if saved[key].size != tensor.shape:
            raise ValueError(
                f"checkpoint {folder} has {key.removeprefix('model.')} of shape"
                f" {tuple(saved[key].size)}, the model of shape {tuple(tensor.shape)}"
            )
    numbers = {int(key.split(".")[1]) for key in entries if key.startswith("optimizer.")}
    if num_optimizers and numbers and max(numbers) >= num_optimizers:
        raise ValueError(
            f"optimizers ({num_optimizers}) must be as many as checkpoint {folder} has"
            f" ({max(numbers) + 1})"
        )


def _empty_optimizer_state(
    folder: Path,
    model: nn.Module | Mapping[str, Tensor],
    optimizers: Sequence[Optimizer],
    entries: dict[str, Any],
) -> dict[str, tuple[Optimizer, nn.Parameter, str, Tensor]]:
    """Allocates tensors for every saved state, sharded like its parameter is now."""
    parameters, fresh = _parameters(model), {}
    held = [{p: group for group in o.param_groups for p in group["params"]} for o in optimizers]
    for entry_key, entry in entries.items():
        kind, *rest = entry_key.split(".", 3)
        if kind != "optimizer" or not optimizers:
            continue
        number, key, name = int(rest[0]), rest[1], rest[2]
        parameter = parameters.get(name)
        if parameter is None or parameter not in held[number]:
            raise ValueError(f"optimizers[{number}] must hold {name}, as in checkpoint {folder}")
        dtype = entry.properties.dtype
        if entry.size == parameter.shape:
            room = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        else:
            # As torch's `load_state_dict`: the step is read on the device by these kernels alone.
            group = held[number][parameter]
            on_device = group.get("fused") or group.get("capturable")
            place = parameter.device if on_device else torch.device("cpu")
            room = torch.zeros(entry.size, dtype=dtype, device=place)
        fresh[entry_key] = (optimizers[number], parameter, key, room)
    return fresh


def _fresh(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.new")
