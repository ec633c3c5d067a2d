"""Reads Whisper weights from a CTranslate2 model file.

The layout (version 6, little endian) is that of `ModelSpec._serialize` in CTranslate2: a version
word, the name of the specification and its revision; the count of variables, each with its name,
shape, type, size in bytes and raw data; the count of aliases, each a pair of names. A name is
stored with its length in 16 bits and a closing zero byte.
"""

import math
import re
import struct
from pathlib import Path

import torch
from torch import Tensor

FORMAT_VERSION = 6

_DTYPES = {
    0: torch.float32,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.float16,
    5: torch.bfloat16,
}


class _Cursor:
    """Reads the bytes of a file sequentially, with bounds checks."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.offset = 0

    def take(self, size: int, what: str) -> bytes:
        end = self.offset + size
        if end > len(self.data):
            raise ValueError(
                f"file ends at byte {len(self.data)}, but {what} needs bytes "
                f"{self.offset} to {end}: it is cut short or damaged"
            )
        chunk = self.data[self.offset : end]
        self.offset = end
        return chunk

    def number(self, code: str, what: str) -> int:
        layout = struct.Struct(f"<{code}")
        return layout.unpack(self.take(layout.size, what))[0]

    def name(self, what: str) -> str:
        raw = self.take(self.number("H", what), what)
        if not raw.endswith(b"\0"):
            raise ValueError(f"{what} does not end with a zero byte: the file is damaged")
        try:
            return raw[:-1].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is not UTF-8 text: the file is damaged") from error

    def variable(self) -> tuple[str, Tensor]:
        name = self.name("a variable's name")
        shape = [self.number("I", name) for _ in range(self.number("B", name))]
        type_id = self.number("B", name)
        size = self.number("I", name)
        if type_id not in _DTYPES:
            raise ValueError(f"{name} has type {type_id}, expected one of {sorted(_DTYPES)}")
        dtype = _DTYPES[type_id]
        expected = math.prod(shape) * dtype.itemsize
        if size != expected:
            raise ValueError(f"{name} holds {size} bytes, expected {expected} for {shape} {dtype}")
        # A copy: the raw data may be unaligned, and torch requires aligned, writable memory.
        data = bytearray(self.take(size, name))
        flat = torch.frombuffer(data, dtype=dtype) if size else torch.empty(0, dtype=dtype)
        return name, flat.reshape(shape)


def read_ctranslate2(*paths: Path) -> dict[str, Tensor]:
    """Reads all variables of a CTranslate2 model file, aliases resolved.

    Args:
        *paths: a `model.bin` of format version 6, or the parts that it was split into, in order.

    Returns:
        The tensors by CTranslate2 name, with the shapes and dtypes of the file.

    Raises:
        ValueError: If a file is missing, truncated, damaged or of another version.
    """
    named = " + ".join(map(str, paths))
    try:
        cursor = _Cursor(b"".join(Path(path).read_bytes() for path in paths))
    except OSError as error:
        raise ValueError(f"{named}: cannot be read as a CTranslate2 model: {error}") from error
    try:
        return _read_variables(cursor)
    except ValueError as error:
        raise ValueError(f"{named}: not a whole CTranslate2 model: {error}") from error


def _read_variables(cursor: _Cursor) -> dict[str, Tensor]:
    version = cursor.number("I", "the version")
    if version != FORMAT_VERSION:
        raise ValueError(f"format version ({version}) must be {FORMAT_VERSION}")
    cursor.name("the specification")
    cursor.number("I", "the revision")
    count = cursor.number("I", "the number of variables")
    tensors = dict(cursor.variable() for _ in range(count))
    for _ in range(cursor.number("I", "the number of aliases")):
        alias, target = cursor.name("an alias"), cursor.name("an alias' target")
        if target not in tensors:
            raise ValueError(f"alias {alias} points to {target}, which the file lacks")
        tensors[alias] = tensors[target]
    if cursor.offset != len(cursor.data):
        raise ValueError(f"{len(cursor.data) - cursor.offset} bytes follow the last alias")
    return tensors


_ROOT_NAMES = {
    "embeddings/weight": "embed_tokens.weight",
    "position_encodings/encodings": "embed_positions.weight",
    "conv1/weight": "conv1.weight",
    "conv1/bias": "conv1.bias",
    "conv2/weight": "conv2.weight",
    "conv2/bias": "conv2.bias",
    "layer_norm/gamma": "layer_norm.weight",
    "layer_norm/beta": "layer_norm.bias",
}

# Part of a layer -> the transformers modules whose weights are stored one below the other.
_LAYER_PARTS = {
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
}

_KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


def whisper_state_dict(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Converts the encoder or decoder of a Whisper model to the names of transformers, in float32.

    Args:
        tensors: tensors from :func:`read_ctranslate2`.
        part: `"encoder"` or `"decoder"`.

    Returns:
        A state dict of `WhisperEncoder` or `WhisperDecoder`, without tensors that are not
        parameters there (numbers of heads, flags, and the biases of keys, which are zero).

    Raises:
        ValueError: If `part` is invalid, or the file has no weights of that part.
    """
    if part not in ("encoder", "decoder"):
        raise ValueError(f"part ({part!r}) must be 'encoder' or 'decoder'")
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith(f"{part}/"):
            continue
        tail = name.removeprefix(f"{part}/")
        layer = re.fullmatch(r"layer_(\d+)/(.+)/(weight|bias|gamma|beta)", tail)
        if tail in _ROOT_NAMES:
            state[_ROOT_NAMES[tail]] = tensor.float()
        elif layer and layer[2] in _LAYER_PARTS:
            modules, kind = _LAYER_PARTS[layer[2]], _KINDS[layer[3]]
            for module, rows in zip(modules, tensor.float().chunk(len(modules)), strict=True):
                if not (module.endswith("k_proj") and kind == "bias"):
                    state[f"layers.{layer[1]}.{module}.{kind}"] = rows.contiguous()
    if not state:
        raise ValueError(f"the CTranslate2 model holds no weights of a Whisper {part}")
    return state
