"""Checkpoints inside a stage: written whole or not at all, read only if they belong to the run."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from unimoe_kernels import recover_folder, replace_folder
from unimoe_kernels.distributed import load_sharded, save_sharded
from unimoe_model.tensor_files import save_tensors

_WEIGHTS, _OPTIMIZER, _STATE = "trained.safetensors", "optimizer.pt", "state.json"


def fingerprint(settings: Any) -> str:
    """Short name of everything that decides a stage's result; equal settings, equal name."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class Progress:
    """How far a stage has come.

    Attributes:
        step: optimiser steps done.
        losses: loss of each of them.
        tokens: tokens seen, padding not counted.
        seconds: time spent in them, over all runs.
    """

    step: int = 0
    losses: list[float] | None = None
    tokens: int = 0
    seconds: float = 0.0


def save_checkpoint(
    folder: Path,
    run: str,
    progress: Progress,
    parameters: dict[str, torch.nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    alone: bool = True,
) -> None:
    """Replaces the checkpoint in `folder`; a kill at any moment leaves the old one or the new.

    Args:
        folder: where the checkpoint is.
        run: fingerprint of the stage.
        progress: how far it has come.
        parameters: the parameters being trained, by name.
        optimizers: the optimisers that hold their state.
        alone: whether one process trains. Several write a sharded checkpoint (`save_sharded`), all
            of them together.
    """
    if not alone:
        save_sharded(folder, parameters, optimizers, {"run": run, **vars(progress)})
        return
    fresh = _fresh(folder)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    weights = {name: p.detach().contiguous() for name, p in parameters.items()}
    save_tensors(fresh / _WEIGHTS, weights)
    torch.save([o.state_dict() for o in optimizers], fresh / _OPTIMIZER)
    state = {"run": run, **vars(progress)}
    (fresh / _STATE).write_text(json.dumps(state), encoding="utf-8")
    replace_folder(folder, fresh)


def load_checkpoint(
    folder: Path,
    run: str,
    parameters: dict[str, torch.nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    alone: bool = True,
) -> Progress | None:
    """Continues from the checkpoint in `folder`.

    One that several processes wrote is continued by any number of them, also by one; one that one
    process wrote only by one.

    Returns:
        Its progress, or None if there is no checkpoint; then nothing is changed.

    Raises:
        ValueError: If the checkpoint is of another configuration or cannot be read.
    """
    if alone:
        recover_folder(folder)
    if not alone or (folder / ".metadata").exists():
        return _load_sharded(folder, run, parameters, optimizers)
    if not folder.exists():
        return None
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        weights = load_file(folder / _WEIGHTS)
        optimizer_states = torch.load(folder / _OPTIMIZER, weights_only=True)
        found = state.pop("run")
        progress = Progress(**state)
    except Exception as error:
        raise ValueError(
            f"checkpoint {folder} cannot be read ({error}); delete it to start this stage anew"
        ) from error
    if found != run or weights.keys() != parameters.keys():
        raise ValueError(
            f"checkpoint {folder} is of another configuration ({found}, this run is {run});"
            " give another output folder, or delete it to start this stage anew"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for optimizer, optimizer_state in zip(optimizers, optimizer_states, strict=True):
        optimizer.load_state_dict(optimizer_state)
    return progress


def _load_sharded(
    folder: Path,
    run: str,
    parameters: dict[str, torch.nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
) -> Progress | None:
    try:
        state = load_sharded(folder, parameters, optimizers)
    except ValueError as error:
        raise ValueError(
            f"{error}; give another output folder, or delete it to start this stage anew, or go on"
            " with the number of processes that wrote it"
        ) from error
    if state is None:
        return None
    if (found := state.pop("run", None)) != run:
        raise ValueError(
            f"checkpoint {folder} is of another configuration ({found}, this run is {run});"
            " give another output folder, or delete it to start this stage anew"
        )
    return Progress(**state)


def completed_run(folder: Path, run: str) -> bool:
    """Whether the stage in `folder` is complete.

    Raises:
        ValueError: If it is complete, but of another configuration than `run`, or unreadable.
    """
    path = folder / "metrics.json"
    if not path.exists():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["run"]
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); delete {folder} to train the stage anew"
        ) from error
    if found != run:
        raise ValueError(
            f"{folder} holds a stage of another configuration ({found}, this run is {run}) or of"
            " other data; give another output folder, or delete it"
        )
    return True


def discard_checkpoint(folder: Path) -> None:
    """Removes a checkpoint that the stage's result has replaced."""
    recover_folder(folder)
    for path in (folder, _fresh(folder)):
        shutil.rmtree(path, ignore_errors=True)


def _fresh(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.new")
