"""Files of tensors: read one tensor at a time, written one tensor at a time."""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SAFETENSORS, PICKLED = ".safetensors", ".bin"
INDEX = "model.safetensors.index.json"
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class _Place:
    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorFiles:
    """Tensors of several files by name, none of which is in memory before it is read.

    A name of a later file takes the place of the same name of an earlier one.

    Args:
        paths: `.safetensors` or `.bin` files; the latter are read with `weights_only=True`.
        rename: what a tensor is called, from what its file calls it.

    Raises:
        ValueError: If a file is missing, cut short, damaged, or holds something else.
    """

    def __init__(self, paths: Iterable[Path], rename: Callable[[str], str] = lambda name: name):
        self._places: dict[str, _Place] = {}
        self._opened: tuple[Path, Mapping[str, Tensor]] | None = None
        self.add(paths, rename)

    def add(self, paths: Iterable[Path], rename: Callable[[str], str] = lambda name: name) -> None:
        """Adds files, as in the constructor."""
        for path in paths:
            if not path.is_file():
                raise ValueError(f"file {path} is missing")
            read = _safetensors_header if path.suffix == SAFETENSORS else self._pickled_header
            for key, (shape, dtype) in read(path).items():
                self._places[rename(key)] = _Place(path, key, shape, dtype)

    def join(self, others: "TensorFiles") -> None:
        """Adds the tensors of others, under their names there."""
        self._places |= others._places

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: place.shape for name, place in self._places.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._places[name].dtype

    def read(self, name: str, rows: slice | None = None, index: int | None = None) -> Tensor:
        """A tensor, its `index`-th entry, or these rows of that; nothing more is loaded."""
        place = self._places[name]
        if place.path.suffix == SAFETENSORS:
            with safe_open(place.path, framework="pt") as file:
                if index is None:
                    return file.get_tensor(place.key).clone()
                part = file.get_slice(place.key)[index, rows if rows is not None else slice(None)]
                return part.clone()
        tensor = self._pickled(place.path)[place.key]
        tensor = tensor if index is None else tensor[index]
        return (tensor if rows is None else tensor[rows]).clone()

    def _pickled_header(self, path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        tensors = self._pickled(path)
        return {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}

    def _pickled(self, path: Path) -> Mapping[str, Tensor]:
        """The file's tensors, mapped into memory; one file at a time."""
        if self._opened is None or self._opened[0] != path:
            self._opened = None
            try:
                tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except (RuntimeError, EOFError, OSError, ValueError, UnpicklingError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"file {path} is cut short or damaged: {reason}") from error
            if not isinstance(tensors, dict) or not all(
                isinstance(value, Tensor) for value in tensors.values()
            ):
                raise ValueError(f"file {path} must hold a dict of tensors")
            self._opened = (path, tensors)
        return self._opened[1]


def _safetensors_header(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes; tensors that the file is too short for are named."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < size else {}
        header.pop("__metadata__", None)
        ends = {name: 8 + length + entry["data_offsets"][1] for name, entry in header.items()}
        found = {n: (tuple(e["shape"]), _DTYPES[e["dtype"]]) for n, e in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"file {path} is cut short or damaged: it has no whole header") from error
    cut = [name for name, end in ends.items() if end > size]
    if cut or length >= size:
        which = f"{cut[0]} is not whole ({len(cut)} are not)" if cut else "it has no whole header"
        raise ValueError(f"file {path} is cut short: {which}")
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"file {path} is damaged: {error}") from error
    return found


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
            if (folder / f"{stem}{suffix}").is_file():
                return [folder / f"{stem}{suffix}"]
    names = [f"{stem}{suffix}" for stem in stems for suffix in (SAFETENSORS, PICKLED)]
    raise ValueError(f"folder ({folder}) must hold weights: one of {names}, or an index")


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


def write_tensors(
    path: Path,
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str], Tensor],
    on_tensor: Callable[[str], None] = lambda name: None,
) -> None:
    """Writes a safetensors file, with one tensor in memory at a time.

    The format: an 8-byte length, a JSON header with the place of every tensor, and their bytes.

    Args:
        path: written from the start.
        layout: shape and dtype of each tensor, in their order in the file.
        read: gives a tensor by name.
        on_tensor: is told of each one written.

    Raises:
        ValueError: If a tensor has not the shape and dtype that was announced.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in layout.items():
        start, end = end, end + num_bytes(shape, dtype)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, (shape, dtype) in layout.items():
            tensor = read(name)
            if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                raise ValueError(
                    f"{name} ({tensor.dtype}, shape {list(tensor.shape)}) must be {dtype} of shape"
                    f" {list(shape)}"
                )
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            file.write(memoryview(flat.numpy()))
            on_tensor(name)


def num_bytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    count = 1
    for size in shape:
        count *= size
    return count * torch.empty((), dtype=dtype).element_size()
