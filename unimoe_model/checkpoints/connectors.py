"""Connectors that a checkpoint lacks: drawn anew, or taken from another checkpoint."""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor
from transformers.modeling_utils import local_torch_dtype

from unimoe_model.checkpoints.files import TensorFiles, shards
from unimoe_model.checkpoints.names import own_part
from unimoe_model.checkpoints.plan import Matrix
from unimoe_model.configuration import UniMoEConfig
from unimoe_model.connectors import build_connector

UNUSED = "model.speech_connector.decoder.embed_tokens.weight"
"""Has one row here, which is never read."""
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
        Its tensors, and what becomes of them once each is called `<name> of <folder>`.

    Raises:
        ValueError: If the folder has no aligner, or one for the same.
    """
    files = TensorFiles(shards(folder, ("mm_audio_aligner", "model", "pytorch_model")))
    found = what_it_hears(files.meta)
    prefixes = ("model.mm_audio_aligner.", "model.query_tokens")
    aligner = [name for name in files.meta if name.startswith(prefixes)]
    if not aligner or found == hears:
        raise ValueError(
            f"folder ({folder}) must hold an aligner for what the source cannot hear; it is for"
            f" {found if aligner else 'nothing'}"
        )
    parts = {name: own_part(name, found) for name in aligner}
    return files, {
        part.target: Matrix(f"{name} of {folder}")
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
    initial: dict[str, Tensor] = {}
    for kind in ("image", "speech", "audio"):
        prefix = f"model.{kind}_connector."
        if not any(name.startswith(prefix) for name in planned):
            with torch.random.fork_rng(devices=[]), local_torch_dtype(config.dtype):
                torch.manual_seed(_SEED)
                state = build_connector(config, kind).state_dict()
            initial |= {prefix + name: value for name, value in state.items()}
    if UNUSED in expected and UNUSED not in initial:
        width = config.speech_connector["d_model"]
        initial[UNUSED] = torch.zeros(1, width, dtype=config.dtype)
    return initial
