"""Connectors that a checkpoint lacks: initialised, or taken from another checkpoint."""

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
"""An embedding with one row, which is never read."""
_SEED = 0


def what_it_hears(names: Collection[str]) -> str:
    """Kind of sound of a checkpoint: `"audio"` if its aligner is a Q-Former, else `"speech"`."""
    return "audio" if any(".qformer.qformer." in name for name in names) else "speech"


def other_half(folder: Path, hears: str) -> tuple[TensorFiles, dict[str, Matrix]]:
    """Reads the aligner of a checkpoint for the other kind of sound.

    Args:
        folder: folder of a model, or of an adapter with its `mm_audio_aligner` file.
        hears: kind of sound of the first checkpoint; this one must have the other kind.

    Returns:
        Its tensors, and the weights of the connector by parameter name, which refer to tensors as
        `<name> of <folder>`.

    Raises:
        ValueError: If the folder has no aligner, or one for the same kind of sound.
    """
    files = TensorFiles(shards(folder, ("mm_audio_aligner", "model", "pytorch_model")))
    found = what_it_hears(files.meta)
    prefixes = ("model.mm_audio_aligner.", "model.query_tokens")
    aligner = [name for name in files.meta if name.startswith(prefixes)]
    if not aligner or found == hears:
        raise ValueError(
            f"folder ({folder}) must hold an aligner for the kind of sound that the source lacks;"
            f" it holds {f'one for {found}' if aligner else 'none'}"
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
    """Initial weights, with a fixed seed, of connectors that no other source provides.

    Args:
        config: the model's configuration.
        planned: names of parameters that another source provides.
        expected: names of all parameters of the model.

    Returns:
        The weights by parameter name, in `config.dtype`.
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
