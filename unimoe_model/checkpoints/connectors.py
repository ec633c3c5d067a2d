"""Connectors that a checkpoint lacks: drawn anew, or taken from another checkpoint."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from unimoe_model.checkpoints.files import PICKLED, SAFETENSORS, TensorFiles, shards
from unimoe_model.checkpoints.names import own_part
from unimoe_model.checkpoints.plan import Matrix
from unimoe_model.configuration import UniMoEConfig
from unimoe_model.connectors import build_connector

UNUSED = "model.speech_connector.decoder.embed_tokens.weight"
"""Has one row here, which is never read."""
_ELSEWHERE = "elsewhere:"
_SEED = 0


def what_it_hears(names: Collection[str]) -> str:
    """`"audio"` if an aligner is a Q-Former, else `"speech"`."""
    return "audio" if any(".qformer.qformer." in name for name in names) else "speech"


def other_half(folder: Path, hears: str) -> tuple[TensorFiles, dict[str, Matrix]]:
    """The aligner of another checkpoint.

    Args:
        folder: holds a model, or an adapter with its `mm_audio_aligner` file.
        hears: what the first checkpoint hears; the other must hear the other.

    Returns:
        Its tensors, whose names begin with `elsewhere:`, and what becomes of them.

    Raises:
        ValueError: If the folder has no aligner, or one for the same.
    """
    stems = [folder / f"mm_audio_aligner{suffix}" for suffix in (SAFETENSORS, PICKLED)]
    paths = [path for path in stems if path.is_file()][:1] or shards(folder)
    files = TensorFiles(paths, lambda name: _ELSEWHERE + name)
    names = [name.removeprefix(_ELSEWHERE) for name in files.shapes]
    found = what_it_hears(names)
    aligner = [n for n in names if n.startswith(("model.mm_audio_aligner.", "model.query_tokens"))]
    if not aligner or found == hears:
        raise ValueError(
            f"folder ({folder}) must hold an aligner for what the source cannot hear; it is for"
            f" {found if aligner else 'nothing'}"
        )
    parts = {name: own_part(name, found) for name in aligner}
    return files, {
        part.target: Matrix(_ELSEWHERE + name)
        for name, part in parts.items()
        if part is not None and part.target != UNUSED
    }


def initial_connectors(
    config: UniMoEConfig, planned: Collection[str], expected: Collection[str]
) -> dict[str, Tensor]:
    """Weights of the connectors of which nothing is planned, drawn with a fixed seed.

    Args:
        config: of the model.
        planned: parameters that come from elsewhere.
        expected: all parameters of the model.
    """
    initial: Mapping[str, Tensor] = {}
    for kind in ("image", "speech", "audio"):
        prefix = f"model.{kind}_connector."
        if not any(name.startswith(prefix) for name in planned):
            with torch.random.fork_rng(devices=[]), _default_dtype(config.dtype):
                torch.manual_seed(_SEED)
                state = build_connector(config, kind).state_dict()
            initial |= {prefix + name: value for name, value in state.items()}
    if UNUSED in expected and UNUSED not in initial:
        width = config.speech_connector["d_model"]
        initial[UNUSED] = torch.zeros(1, width, dtype=config.dtype)
    return initial


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules are built in this dtype, and take no memory in a wider one before."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
