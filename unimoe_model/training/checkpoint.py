"""Checkpoints inside a stage: written whole or not at all, read only if they belong to the run."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unimoe_kernels import recover_folder
from unimoe_kernels.distributed import load_sharded, save_sharded
from unimoe_model.full_disk import naming_full_disk


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
) -> None:
    """Replaces the checkpoint in `folder`; a kill at any moment leaves the old one or the new.

    All processes that train together call it (`save_sharded`).

    Args:
        folder: where the checkpoint is.
        run: fingerprint of the stage.
        progress: how far it has come.
        parameters: the parameters being trained, by name.
        optimizers: the optimisers that hold their state.

    Raises:
        OSError: If the disk is full, naming what was needed; the old checkpoint is left.
    """
    needed = checkpoint_bytes(parameters, optimizers)
    left = "the one before it is whole, and the same command goes on from there"
    what = f"the checkpoint of step {progress.step}"
    try:
        with naming_full_disk(folder.parent, what, needed, left):
            save_sharded(folder, parameters, optimizers, {"run": run, **vars(progress)})
    except OSError:
        shutil.rmtree(_fresh(folder), ignore_errors=True)
        raise


def load_checkpoint(
    folder: Path,
    run: str,
    parameters: dict[str, torch.nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
) -> Progress | None:
    """Continues from the checkpoint in `folder`, with any number of processes.

    Returns:
        Its progress, or None if there is no checkpoint; then nothing is changed.

    Raises:
        ValueError: If the checkpoint is of another configuration or cannot be read; then nothing is
            changed.
    """

    def check(extra: dict[str, Any]) -> None:
        if extra.get("run") != run:
            raise ValueError(
                f"checkpoint {folder} is of another configuration ({extra.get('run')}, this run is"
                f" {run})"
            )

    try:
        state = load_sharded(folder, parameters, optimizers, check)
    except ValueError as error:
        raise ValueError(
            f"{error}; give another output folder, or delete it to start this stage anew"
        ) from error
    if state is None:
        return None
    del state["run"]
    return Progress(**state)


def checkpoint_bytes(
    parameters: dict[str, torch.nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]
) -> int:
    """Bytes of a checkpoint's tensors."""
    states = [v for o in optimizers for values in o.state.values() for v in values.values()]
    tensors = [*parameters.values(), *(v for v in states if isinstance(v, torch.Tensor))]
    return sum(t.numel() * t.element_size() for t in tensors)


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
    """Removes a checkpoint that the stage's result has replaced; one process calls it."""
    recover_folder(folder)
    for path in (folder, _fresh(folder)):
        shutil.rmtree(path, ignore_errors=True)


def _fresh(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.new")
