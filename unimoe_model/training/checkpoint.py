"""Checkpoints within a stage, written atomically and validated on loading."""

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
    """Hash of everything that determines a stage's result, 16 hexadecimal digits."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class Progress:
    """Progress of a stage.

    Attributes:
        step: number of optimiser steps done.
        losses: loss of each step.
        tokens: tokens seen, without padding.
        seconds: training time in seconds, summed over interruptions.
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
    """Replaces the checkpoint in `folder`; a kill at any moment leaves the old one or the new one.

    All processes that train together must call it (`save_sharded`).

    Args:
        folder: folder of the checkpoint.
        run: fingerprint of the stage.
        progress: progress of the stage.
        parameters: trained parameters by name.
        optimizers: optimisers of these parameters.

    Raises:
        OSError: If the disk is full; the message has the bytes required, and the old checkpoint
            stays intact.
    """
    needed = checkpoint_bytes(parameters, optimizers)
    left = "the previous one is intact, and the same command resumes from it"
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
    """Loads the checkpoint in `folder` into parameters and optimisers, on any number of processes.

    Args:
        folder: folder of the checkpoint.
        run: fingerprint of the stage.
        parameters: trained parameters by name, overwritten in place.
        optimizers: optimisers of these parameters, overwritten in place.

    Returns:
        Its progress, or None if there is no checkpoint, in which case nothing is changed.

    Raises:
        ValueError: If the checkpoint is of another configuration or cannot be read; nothing is
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
    """Size of a checkpoint's tensors in bytes."""
    states = [v for o in optimizers for values in o.state.values() for v in values.values()]
    tensors = [*parameters.values(), *(v for v in states if isinstance(v, torch.Tensor))]
    return sum(t.numel() * t.element_size() for t in tensors)


def completed_run(folder: Path, run: str) -> bool:
    """Whether the stage in `folder` is complete.

    Raises:
        ValueError: If it is complete but its fingerprint differs from `run`, or it is unreadable.
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
    """Removes the checkpoint of a completed stage; called by one process."""
    recover_folder(folder)
    for path in (folder, _fresh(folder)):
        shutil.rmtree(path, ignore_errors=True)


def _fresh(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.new")
