"""Assembles an MoE checkpoint from dense checkpoints, as run by `unimoe assemble`."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from unimoe_model.checkpoints.convert import ASIDE, parameter_shapes
from unimoe_model.checkpoints.files import TensorFiles, read_config, shards
from unimoe_model.checkpoints.names import LLM, PROJECTIONS
from unimoe_model.checkpoints.plan import Matrix, Recipe, Stack, checked_layout
from unimoe_model.checkpoints.record import FILE
from unimoe_model.checkpoints.writing import (
    SHARD_BYTES,
    Progress,
    refuse_existing,
    whole_folder,
    write_shards,
)
from unimoe_model.configuration import UniMoEConfig

_ROUTER = ".mlp.router.weight"
# Weights, and the record of a conversion, which describes the dense model.
_LEFT_OUT = re.compile(
    rf"(model.*\.safetensors(\.index\.json)?|pytorch_model.*|config\.json|{FILE}|{ASIDE}.*)"
)


def assemble(
    base: Path,
    experts: Mapping[str, Path],
    target: Path,
    top_k: int = 2,
    moe_layers: str | list[int] = "all",
    seed: int = 0,
    on_bytes: Progress = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
) -> UniMoEConfig:
    """Writes the model that the third stage starts from.

    Attention, embeddings and connectors are those of the base, each expert is the FFN of one
    checkpoint, and routers are drawn from normal(0, initializer_range). One file of weights at a
    time is in memory. The record of a conversion of the base is left out: the published layout of
    the base has no place for experts.

    Args:
        base: folder of a dense model.
        experts: folders of dense models whose FFNs become the experts, by the names that
            `expert_origins` records; may include the base.
        target: output folder; must not exist.
        top_k: number of experts per token.
        moe_layers: layers with experts, as in `UniMoEConfig`.
        seed: seed for the routers.
        on_bytes: called with the number of bytes read so far and their total.
        shard_bytes: maximum size of a weight file in bytes.

    Returns:
        The configuration of the model.

    Raises:
        ValueError: If `top_k` is out of range, a model is not dense, a tensor is missing or has a
            wrong shape or dtype, or the target already exists.
    """
    refuse_existing(target)
    if not 1 <= top_k <= len(experts):
        raise ValueError(
            f"top_k ({top_k}) must be at least 1 and at most the number of experts ({len(experts)})"
        )
    dense = _dense_config(base)
    for folder in experts.values():
        _dense_config(folder)
    fields = dense.to_dict() | {
        "num_experts": len(experts),
        "num_experts_per_tok": top_k,
        "moe_layers": moe_layers,
        "expert_origins": list(experts),
    }
    config = UniMoEConfig.from_dict(fields)
    files = TensorFiles()
    for folder in dict.fromkeys((base, *experts.values())):
        files.join(TensorFiles(shards(folder)), f" of {folder}")
    expected = parameter_shapes(config)
    if config.tie_word_embeddings:  # tied weights are stored once
        del expected["lm_head.weight"]
    recipes = {n: _recipe(n, base, experts) for n in expected if not n.endswith(_ROUTER)}
    layout = checked_layout(recipes, files.meta, expected)
    dtype = layout[f"{LLM}embed_tokens.weight"].dtype
    generator = torch.Generator().manual_seed(seed)
    spread = config.text_config.initializer_range
    routers = {
        name: (spread * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in expected.items()
        if name.endswith(_ROUTER)
    }
    layout |= {name: router.to("meta") for name, router in routers.items()}
    with whole_folder(target) as folder:
        write_shards(
            folder,
            layout,
            lambda name: routers[name] if name in routers else recipes[name].read(files.read),
            on_bytes,
            shard_bytes,
        )
        config.save_pretrained(folder)
        for path in base.iterdir():
            if path.is_file() and not _LEFT_OUT.fullmatch(path.name):
                shutil.copyfile(path, folder / path.name)
    return config


def _recipe(name: str, base: Path, experts: Mapping[str, Path]) -> Recipe:
    mlp, _, stack = name.rpartition("experts.")
    if stack not in PROJECTIONS:
        return Matrix(f"{name} of {base}")
    return Stack(
        [
            [Matrix(f"{mlp}{matrix}_proj.weight of {folder}") for matrix in PROJECTIONS[stack]]
            for folder in experts.values()
        ]
    )


def _dense_config(folder: Path) -> UniMoEConfig:
    model_type = read_config(folder).get("model_type")
    config = UniMoEConfig.from_pretrained(folder)
    if model_type != UniMoEConfig.model_type or config.num_experts:
        raise ValueError(f"folder ({folder}) must hold a dense {UniMoEConfig.model_type} model")
    return config
