"""Files of tensors, read one tensor at a time."""

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
    """Tensors of several files by name, none of which is in memory before it is used.

    A name of a later file takes the place of the same name of an earlier one.

    Args:
        paths: `.safetensors` or `.bin` files; the latter are read with `weights_only=True`.
        rename: what a tensor is called, from what its file calls it.

    Attributes:
        meta: every tensor on the meta device: its shape and dtype.

    Raises:
        ValueError: If a file is missing, cut short, damaged, or holds something else.
    """

    def __init__(self, paths: Iterable[Path] = (), rename: Callable[[str], str] = str):
        self.meta: dict[str, Tensor] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        self._opened: tuple[Path, Mapping[str, Tensor]] | None = None
        self.add(paths, rename)

    def add(self, paths: Iterable[Path], rename: Callable[[str], str] = str) -> None:
        """Adds files, as in the constructor."""
        for path in paths:
            if not path.is_file():
                raise ValueError(f"file {path} is missing")
            with _named(path):
                tensors = load_file(path) if path.suffix == SAFETENSORS else self._pickled(path)
            for key, tensor in tensors.items():
                self.meta[rename(key)] = tensor.to("meta")
                self._places[rename(key)] = (path, key)

    def join(self, others: "TensorFiles", suffix: str = "") -> None:
        """Adds the tensors of others, under their names there and a suffix."""
        self.meta |= {name + suffix: tensor for name, tensor in others.meta.items()}
        self._places |= {name + suffix: place for name, place in others._places.items()}

    def read(self, name: str) -> Tensor:
        """A tensor mapped into memory: what is not used of it is not loaded."""
        path, key = self._places[name]
        with _named(path):
            if path.suffix != SAFETENSORS:
                return self._pickled(path)[key]
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(key)

    def _pickled(self, path: Path) -> Mapping[str, Tensor]:
        """The file's tensors, mapped into memory; one file at a time."""
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
    """Names the file in the errors of those who read it."""
    try:
        yield
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"file {path} is cut short or damaged: {reason}") from error


def shards(folder: Path, stems: Iterable[str] = ("model", "pytorch_model")) -> list[Path]:
    """Files of the weights of a folder: those that its index names, or the only one.

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
    """The file of tensors of this name without suffix, or None."""
    paths = [folder / f"{stem}{suffix}" for suffix in (SAFETENSORS, PICKLED)]
    return next((path for path in paths if path.is_file()), None)


def read_config(folder: Path) -> dict:
    """Contents of a folder's `config.json`.

    Raises:
        ValueError: If it is missing or no JSON object.
    """
    path = folder / "config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"file {path} must be the configuration of a model: {error}") from error
