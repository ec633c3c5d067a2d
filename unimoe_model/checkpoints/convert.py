"""Streaming conversion of published checkpoints in both directions, run by `unimoe convert`."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from unimoe_model.checkpoints.adapter import CONFIG as ADAPTER_CONFIG
from unimoe_model.checkpoints.adapter import add_adapter
from unimoe_model.checkpoints.connectors import (
    UNUSED,
    initial_connectors,
    other_half,
    what_it_hears,
)
from unimoe_model.checkpoints.files import TensorFiles, read_config, shards
from unimoe_model.checkpoints.plan import (
    Matrix,
    checked_layout,
    plan_from_published,
    plan_to_published,
)
from unimoe_model.checkpoints.published_config import config_from_published
from unimoe_model.checkpoints.record import Conversion
from unimoe_model.checkpoints.writing import (
    SHARD_BYTES,
    Progress,
    refuse_existing,
    whole_folder,
    write_json,
    write_shards,
)
from unimoe_model.configuration import UniMoEConfig
from unimoe_model.prompt import VICUNA_SYSTEM

ASIDE = "published_aside"
TOKENIZER = "tokenizer.model"
EMBEDDING = "model.embed_tokens.weight"


def convert_from_published(
    source: Path,
    target: Path,
    base: Path | None = None,
    tokenizer: Path | None = None,
    connector: Path | None = None,
    overrides: Mapping | None = None,
    on_bytes: Progress = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """Converts a published checkpoint to a folder that `from_pretrained` reads.

    Everything is checked before anything is written, and the folder appears once it is complete.
    One file of weights at a time is in memory.

    Args:
        source: folder of a model, or of an adapter with LoRA, gates and aligner.
        target: output folder; must not exist.
        base: folder of the model that an adapter belongs to; required for adapters.
        tokenizer: folder with the tokenizer, if neither source nor base has one.
        connector: folder of a published checkpoint whose aligner becomes the connector that the
            source lacks.
        overrides: fields of `UniMoEConfig` that replace those of the source.
        on_bytes: called with the number of bytes read so far and their total.
        shard_bytes: maximum size of a weight file in bytes.

    Returns:
        The record of the conversion, which is also written to `conversion.json`.

    Raises:
        ValueError: If a file is missing or damaged, a tensor is missing, unexpected or of a wrong
            shape, or the target already exists.
    """
    refuse_existing(target)
    is_adapter = (source / ADAPTER_CONFIG).is_file()
    if is_adapter != (base is not None):
        if is_adapter:
            raise ValueError(
                f"folder ({source}) holds an adapter, which requires its base; got None"
            )
        raise ValueError(f"base ({base}) is not supported: folder ({source}) holds no adapter")
    places = [place for place in (tokenizer, source, base) if place]
    files = TensorFiles(shards(base or source))
    published = read_config(base or source)
    if published.get("model_type") == UniMoEConfig.model_type:
        raise ValueError(
            f"folder ({base or source}) must hold a published checkpoint; it is a"
            f" {UniMoEConfig.model_type} model already"
        )
    loras = {}
    if is_adapter:
        published |= read_config(source) if (source / "config.json").is_file() else {}
        loras = add_adapter(files, source)
    hears = what_it_hears(files.meta)
    fields = dict(overrides or {})
    if connector is not None:
        other, elsewhere = other_half(connector, hears)
        fields = _fields_of_other(connector, other, hears) | fields
    config = config_from_published(published, files.meta, hears, **fields)
    plan = plan_from_published(
        files.meta, hears, _lora_scale(published), loras, config.num_experts or None
    )
    if connector is not None:
        files.join(other, f" of {connector}")
        plan.targets |= elsewhere
    if EMBEDDING not in files.meta:
        raise ValueError(f"{EMBEDDING} is missing from the checkpoint")
    config.dtype = files.meta[EMBEDDING].dtype
    expected = parameter_shapes(config)
    initial = initial_connectors(config, plan.targets, expected)
    # Initial weights are written first, so that their memory is freed before the rest is read.
    layout = {name: tensor.to("meta") for name, tensor in initial.items()}
    layout |= checked_layout(plan.targets, files.meta, expected)
    missing = [name for name in expected if name not in layout]
    if missing:
        raise ValueError(f"the checkpoint has nothing for {missing[0]} ({len(missing)} missing)")
    made = Conversion(
        hears=hears,
        eight=any("deepspeed_moe" in name for name in files.meta),
        published_config=published,
        aside=plan.aside,
        initialised=sorted(initial),
        merged=plan.merged,
    )
    processor = _processor(config, published, places)
    with whole_folder(target) as folder:
        write_shards(
            folder,
            layout,
            lambda n: initial.pop(n) if n in initial else plan.targets[n].read(files.read),
            on_bytes,
            shard_bytes,
        )
        if plan.aside:
            kept = {name: files.meta[name] for name in plan.aside}
            write_shards(folder, kept, lambda n: Matrix(n).read(files.read), stem=ASIDE)
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        _copy_tokenizer(places, folder)
        made.save(folder)
    return made


def convert_to_published(
    source: Path,
    target: Path,
    on_bytes: Progress = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """Undoes `convert_from_published`: tensors and `config.json` are restored exactly.

    Merged LoRA stays merged. Connectors that the published checkpoint lacked are left out, because
    its layout has no names for them.

    Args:
        source: folder written by `convert_from_published`; its weights may have been trained since.
        target: output folder; must not exist.
        on_bytes: called with the number of bytes read so far and their total.
        shard_bytes: maximum size of a weight file in bytes.

    Returns:
        The record of the conversion that was undone.

    Raises:
        ValueError: If the source was not converted, a file is missing or damaged, or the target
            already exists.
    """
    refuse_existing(target)
    made = Conversion.load(source)
    if made is None:
        raise ValueError(
            f"folder ({source}) must have been written by unimoe convert: it has no conversion.json"
        )
    files = TensorFiles(shards(source))
    expected = parameter_shapes(UniMoEConfig.from_pretrained(source))
    checked_layout({name: Matrix(name) for name in expected | files.meta}, files.meta, expected)
    absent = {"speech": "model.audio_connector.", "audio": "model.speech_connector."}[made.hears]
    left_out = {UNUSED, *made.initialised}
    asked = {
        name: tensor
        for name, tensor in files.meta.items()
        if name not in left_out and not name.startswith(absent)
    }
    targets = plan_to_published(asked, made.hears, made.eight)
    if made.aside:
        aside = TensorFiles(shards(source, [ASIDE]))
        targets |= {name: Matrix(name) for name in aside.meta}
        files.join(aside)
    layout = {name: recipe.read(files.meta.__getitem__) for name, recipe in targets.items()}
    with whole_folder(target) as folder:
        write_shards(folder, layout, lambda n: targets[n].read(files.read), on_bytes, shard_bytes)
        write_json(folder / "config.json", made.published_config)
        _copy_tokenizer([source], folder)
    return made


def parameter_shapes(config: UniMoEConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters of a configuration's model, by name."""
    from unimoe_model.modeling import UniMoEForConditionalGeneration

    with torch.device("meta"):
        model = UniMoEForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _fields_of_other(folder: Path, files: TensorFiles, hears: str) -> dict:
    """Fields of the configuration for the connector of the other checkpoint."""
    other = {"speech": "audio", "audio": "speech"}[hears]
    config = config_from_published(read_config(folder), files.meta, other)
    names = ("encoder", "feature_size", "num_queries", "connector")
    return {f"{other}_{name}": getattr(config, f"{other}_{name}") for name in names}


def _lora_scale(published: Mapping) -> float | None:
    if not published.get("lora_r"):
        return None
    if not published.get("lora_alpha"):
        raise ValueError("config.json must have lora_alpha where it has lora_r")
    return published["lora_alpha"] / published["lora_r"]


def _processor(config: UniMoEConfig, published: Mapping, places: list[Path]):
    from unimoe_model.processing import ASPECT_RATIOS, UniMoEProcessor
    from unimoe_model.tokenization import load_llama_tokenizer

    names = (TOKENIZER, "tokenizer.json")
    folder = next((p for p in places if any((p / name).is_file() for name in names)), None)
    if folder is None:
        raise ValueError(f"one of {[str(p) for p in places]} must hold a tokenizer: {names}")
    tokenizer = load_llama_tokenizer(folder)
    found = {kind: tokenizer.convert_tokens_to_ids(f"<{kind}>") for kind in config.media_token_ids}
    if found != config.media_token_ids:
        raise ValueError(
            f"tokenizer of {folder} has the placeholder ids {found}, the model has"
            f" {config.media_token_ids}; the tokenizer must have vocab_size"
            f" ({config.text_config.vocab_size}) tokens"
        )
    aspect = published.get("image_aspect_ratio", "square")
    return UniMoEProcessor.from_config(
        config,
        tokenizer,
        system_prompt=VICUNA_SYSTEM,
        image_aspect_ratio=aspect if aspect in ASPECT_RATIOS else "square",
    )


def _copy_tokenizer(places: list[Path], folder: Path) -> None:
    for place in places:
        if (place / TOKENIZER).is_file():
            shutil.copyfile(place / TOKENIZER, folder / TOKENIZER)
            return
