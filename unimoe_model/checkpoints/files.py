"""Files of tensors that are read one tensor at a time."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

SAFETENSORS, PICKLED = ".safetensors", ".bin"


class TensorFiles:
    """Tensors of several files by name, loaded when they are used.

    A tensor of a later file replaces the tensor of the same name of an earlier one.

    Args:
        paths: `.safetensors` or `.bin` files; the latter are read with `weights_only=True`.
        rename: maps a tensor's name in its file to its name here.

    Attributes:
        meta: all tensors by name, on the meta device.

    Raises:
        ValueError: If a file is missing, truncated, damaged, or not a dict of tensors.
    """

    def __init__(self, paths: Iterable[Path] = (), rename: Callable[[str], str] = str):
        self.meta: dict[str, Tensor] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        self._opened: tuple[Path, Mapping[str, Tensor]] | None = None
        self.add(paths, rename)

    def add(self, paths: Iterable[Path], rename: Callable[[str], str] = str) -> None:
        """Adds files; the arguments are those of the constructor."""
        for path in paths:
            if not path.is_file():
                raise ValueError(f"file {path} is missing")
            with _named(path):
                tensors = load_file(path) if path.suffix == SAFETENSORS else self._pickled(path)
            for key, tensor in tensors.items():
                self.meta[rename(key)] = tensor.to("meta")
                self._places[rename(key)] = (path, key)

    def join(self, others: "TensorFiles", suffix: str = "") -> None:
        """Adds the tensors of `others`, with `suffix` appended to their names."""
        self.meta |= {name + suffix: tensor for name, tensor in others.meta.items()}
        self._places |= {name + suffix: place for name, place in others._places.items()}

    def read(self, name: str) -> Tensor:
        """Returns a memory-mapped tensor: only the parts that are used are loaded."""
        path, key = self._places[name]
        with _named(path):
            if path.suffix != SAFETENSORS:
                return self._pickled(path)[key]
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(key)

    def _pickled(self, path: Path) -> Mapping[str, Tensor]:
        """The memory-mapped tensors of a file; one file is open at a time."""
        if self._opened is None or self._opened[0] != path:
            self._opened = None
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            if not isinstance(tensors, dict) or not all(
                isinstance(value, Tensor) for value in tensors.values()
            ):
                raise ValueError("it must hold a dict of tensors")
            self._opened = (path, tensors)
        return self._opened[1]


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Adds the file's path to errors raised while it is read."""
    try:
        yield
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"file {path} is truncated or damaged: {reason}") from error


def shards(folder: Path, stems: Iterable[str] = ("model", "pytorch_model")) -> list[Path]:
    """Weight files of a folder: those listed in its index, or the single file.

    Raises:
        ValueError: If there are none, or the index cannot be read.
    """
    for stem in stems:
        for suffix in (SAFETENSORS, PICKLED):
            index = folder / f"{stem}{suffix}.index.json"
            if index.is_file():
                try:
                    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                except (json.JSONDecodeError, KeyError, AttributeError) as error:
                    raise ValueError(f"file {index} must be an index of weights") from error
                return [folder / name for name in sorted(set(names))]
        if path := single_file(folder, stem):
            return [path]
    names = [f"{stem}{suffix}" for stem in stems for suffix in (SAFETENSORS, PICKLED)]
    raise ValueError(f"folder ({folder}) must hold weights: one of {names}, or an index")


def single_file(folder: Path, stem: str) -> Path | None:
    """The path of the tensor file with this stem, or None."""
    paths = [folder / f"{stem}{suffix}" for suffix in (SAFETENSORS, PICKLED)]
    return next((path for path in paths if path.is_file()), None)


def read_config(folder: Path) -> dict:
    """Contents of a folder's `config.json`.

    Raises:
        ValueError: If it is missing or not a JSON object.
    """
    path = folder / "config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"file {path} must be the configuration of a model: {error}") from error
