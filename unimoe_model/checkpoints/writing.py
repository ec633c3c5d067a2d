"""Atomic writing of folders with weights."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from unimoe_kernels import replace_folder
from unimoe_model.permissions import permit_as_usual

SHARD_BYTES = 500_000_000

Progress = Callable[[int, int], None]


def refuse_existing(target: Path) -> None:
    """Raises ValueError if `target` already exists."""
    if target.exists():
        raise ValueError(f"folder ({target}) already exists; expected a new one")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yields a new folder to write into, which is renamed to `target` if the block succeeds.

    Raises:
        ValueError: If `target` already exists.
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
    layout: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    on_bytes: Progress = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
    stem: str = "model",
) -> None:
    """Writes weights in the layout of transformers, with one file in memory at a time.

    Args:
        folder: existing folder.
        layout: tensors by name on the meta device, in the order in which they are read.
        read: returns the tensor of a name, contiguous and in its own memory.
        on_bytes: called with the number of bytes read so far and their total.
        shard_bytes: maximum size of a file in bytes, unless a single tensor is larger.
        stem: prefix of the file names.

    Raises:
        ValueError: If `shard_bytes` is less than 1.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes ({shard_bytes}) must be at least 1")
    split = split_torch_state_dict_into_shards(
        layout, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=shard_bytes
    )
    done, total = 0, split.metadata["total_size"]
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensors[name] = read(name)
            done += tensors[name].nbytes
            on_bytes(done, total)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        permit_as_usual(folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def write_json(path: Path, content: Mapping) -> None:
    """Writes indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
