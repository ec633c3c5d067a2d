"""Writes a folder of weights whole or not at all."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from unimoe_kernels import replace_folder
from unimoe_model.checkpoints.files import INDEX, num_bytes, write_tensors

SHARD_BYTES = 5_000_000_000

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def refuse_existing(target: Path) -> None:
    """Raises ValueError if there is something at `target` already."""
    if target.exists():
        raise ValueError(f"folder ({target}) already exists; expected a new one")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the name `target` if all goes well.

    Raises:
        ValueError: If there is something at `target` already.
    """
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        replace_folder(target, partial, overwrite=False)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_shards(
    folder: Path,
    layout: Layout,
    read: Callable[[str], Tensor],
    on_bytes: Callable[[int], None] = lambda done: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes weights in the layout of transformers, one tensor in memory at a time.

    Args:
        folder: must exist.
        layout: shape and dtype of each tensor, in the order in which they are read.
        read: gives a tensor by name.
        on_bytes: is told the bytes written since the last call.
        shard_bytes: a file holds no more, unless a single tensor does.

    Raises:
        ValueError: If shard_bytes is below 1, or a tensor has not the shape that was announced.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes ({shard_bytes}) must be at least 1")
    files: list[list[str]] = []
    room = 0
    for name, described in layout.items():
        size = num_bytes(*described)
        if not files or size > room:
            files.append([])
            room = shard_bytes
        files[-1].append(name)
        room -= size
    weight_map = {}
    for number, names in enumerate(files, start=1):
        whole = len(files) == 1
        file = "model.safetensors" if whole else f"model-{number:05}-of-{len(files):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        write_tensors(
            folder / file,
            {name: layout[name] for name in names},
            read,
            lambda name: on_bytes(num_bytes(*layout[name])),
        )
    if len(files) > 1:
        total = sum(num_bytes(*described) for described in layout.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, content: Mapping) -> None:
    """Writes readable JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
