"""Published checkpoints to ours and back, streamed: what `unimoe convert` runs."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from unimoe_model.checkpoints.adapter import CONFIG as ADAPTER_CONFIG
from unimoe_model.checkpoints.adapter import add_adapter
from unimoe_model.checkpoints.connectors import (
    UNUSED,
    initial_connectors,
    other_half,
    what_it_hears,
)
from unimoe_model.checkpoints.files import (
    TensorFiles,
    num_bytes,
    read_config,
    shards,
    write_tensors,
)
from unimoe_model.checkpoints.plan import Plan, Stack, plan_from_published, plan_to_published
from unimoe_model.checkpoints.published_config import config_from_published
from unimoe_model.checkpoints.record import Conversion
from unimoe_model.checkpoints.writing import (
    SHARD_BYTES,
    Layout,
    refuse_existing,
    whole_folder,
    write_json,
    write_shards,
)
from unimoe_model.configuration import UniMoEConfig
from unimoe_model.prompt import VICUNA_SYSTEM

ASIDE = "published_aside.safetensors"
TOKENIZER = "tokenizer.model"
EMBEDDING = "model.embed_tokens.weight"
Progress = Callable[[int, int], None]


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

    Everything is checked before anything is written, and the folder appears when it is whole. In
    memory is one stack of experts at a time.

    Args:
        source: a model, or an adapter with LoRA, gates and aligner.
        target: a folder that is not there yet.
        base: the model that an adapter belongs to.
        tokenizer: folder with the tokenizer, unless source or base holds it.
        connector: a published checkpoint whose aligner becomes the connector that source lacks: the
            other half of a unified model.
        overrides: fields of `UniMoEConfig` that are known better than from the source.
        on_bytes: is told the bytes written so far and their total.
        shard_bytes: most bytes of a file of weights.

    Returns:
        What was done, which `conversion.json` keeps.

    Raises:
        ValueError: If a file is missing or damaged, a tensor is missing, one too many or of another
            shape, or the target is there already.
    """
    refuse_existing(target)
    is_adapter = (source / ADAPTER_CONFIG).is_file()
    if is_adapter != (base is not None):
        what = "an adapter, which needs its base" if is_adapter else "no adapter, and needs no base"
        raise ValueError(f"folder ({source}) holds {what}; base is {base}")
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
    hears = what_it_hears(files.shapes)
    fields = dict(overrides or {})
    elsewhere = {}
    if connector is not None:
        other_files, elsewhere = other_half(connector, hears)
        fields = _fields_of_other(connector, other_files, hears) | fields
    config = config_from_published(published, files.shapes, hears, **fields)
    plan = plan_from_published(
        files.shapes, hears, _lora_scale(published), loras, config.num_experts or None
    )
    merged = sorted(
        matrix.name
        for recipe in plan.targets.values()
        for expert in (recipe.experts if isinstance(recipe, Stack) else [[recipe]])
        for matrix in expert
        if matrix.loras
    )
    if connector is not None:
        files.join(other_files)
        plan.targets |= elsewhere
    if EMBEDDING not in files.shapes:
        raise ValueError(f"{EMBEDDING} is missing from the checkpoint")
    config.dtype = files.dtype(EMBEDDING)
    expected = parameter_shapes(config)
    initial = initial_connectors(config, plan.targets, expected)
    layout = _checked_layout(plan, files, initial, expected)
    made = Conversion(
        hears=hears,
        eight=any("deepspeed_moe" in name for name in files.shapes),
        published_config=published,
        aside=plan.aside,
        initialised=sorted(initial),
        merged=merged,
    )
    processor = _processor(config, published, places)
    with whole_folder(target) as folder:
        write_shards(
            folder,
            layout,
            lambda name: initial[name] if name in initial else plan.targets[name].read(files),
            counter(layout, on_bytes),
            shard_bytes,
        )
        if plan.aside:
            kept = {name: (files.shapes[name], files.dtype(name)) for name in plan.aside}
            write_tensors(folder / ASIDE, kept, files.read)
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
    """Undoes `convert_from_published`: the tensors, and `config.json`, are what they were.

    A LoRA that was merged stays merged, and connectors that were not in the published checkpoint
    are left out, as its layout has no place for them.

    Args:
        source: a folder that was converted; its weights may have been trained since.
        target: a folder that is not there yet.
        on_bytes: is told the bytes written so far and their total.
        shard_bytes: most bytes of a file of weights.

    Returns:
        The record of the conversion that was undone.

    Raises:
        ValueError: If the source was not converted, a file is missing or damaged, or the target is
            there already.
    """
    refuse_existing(target)
    made = Conversion.load(source)
    if made is None:
        raise ValueError(f"folder ({source}) must be one that was converted: it has no record")
    files = TensorFiles(shards(source))
    expected = parameter_shapes(UniMoEConfig.from_pretrained(source))
    for name in expected.keys() ^ files.shapes.keys():
        what = "is missing from" if name in expected else "is one too many for"
        raise ValueError(f"{name} {what} the model in {source}")
    absent = {"speech": "model.audio_connector.", "audio": "model.speech_connector."}[made.hears]
    left_out = [n for n in files.shapes if n.startswith(absent) or n in {UNUSED, *made.initialised}]
    plan = plan_to_published(files.shapes, made.hears, made.eight, left_out)
    layout = {
        name: (recipe.shape(files.shapes), files.dtype(recipe.names[0]))
        for name, recipe in plan.targets.items()
    }
    aside = TensorFiles([source / ASIDE] if made.aside else [])
    layout |= {name: (shape, aside.dtype(name)) for name, shape in aside.shapes.items()}
    with whole_folder(target) as folder:
        write_shards(
            folder,
            layout,
            lambda n: plan.targets[n].read(files) if n in plan.targets else aside.read(n),
            counter(layout, on_bytes),
            shard_bytes,
        )
        write_json(folder / "config.json", made.published_config)
        _copy_tokenizer([source], folder)
    return made


def parameter_shapes(config: UniMoEConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters of the model of a configuration."""
    from unimoe_model.modeling import UniMoEForConditionalGeneration

    with torch.device("meta"):
        model = UniMoEForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _checked_layout(
    plan: Plan,
    files: TensorFiles,
    initial: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
) -> Layout:
    """Shape and dtype of every parameter, in the order of the source.

    Raises:
        ValueError: For the first one that is missing, one too many, or of another shape or dtype.
    """
    layout, shapes = {}, files.shapes
    for name, recipe in plan.targets.items():
        if name not in expected:
            raise ValueError(f"{recipe.names[0]} has no place in the model: it has no {name}")
        shape = recipe.shape(shapes)
        if shape != expected[name]:
            raise ValueError(
                f"{recipe.names[0]} gives {name} the shape {list(shape)}, expected"
                f" {list(expected[name])}"
            )
        dtypes = {files.dtype(n) for n in recipe.names} if isinstance(recipe, Stack) else set()
        if len(dtypes) > 1 and not any(m.loras for e in recipe.experts for m in e):
            raise ValueError(f"{name} is made of several dtypes: {sorted(map(str, dtypes))}")
        layout[name] = (shape, files.dtype(recipe.names[0]))
    layout |= {name: (tuple(value.shape), value.dtype) for name, value in initial.items()}
    missing = [name for name in expected if name not in layout]
    if missing:
        raise ValueError(f"the checkpoint has nothing for {missing[0]} ({len(missing)} missing)")
    return layout


def _fields_of_other(folder: Path, files: TensorFiles, hears: str) -> dict:
    """Fields of the configuration about the connector of the other half."""
    other = {"speech": "audio", "audio": "speech"}[hears]
    shapes = {name.partition(":")[2]: shape for name, shape in files.shapes.items()}
    config = config_from_published(read_config(folder), shapes, other)
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
            f"tokenizer of {folder} numbers the placeholders {found}, the model"
            f" {config.media_token_ids}; it must have vocab_size"
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


def counter(layout: Layout, on_bytes: Progress) -> Callable[[int], None]:
    """Adds up what `write_shards` says, and tells it with the total."""
    total, done = sum(num_bytes(*described) for described in layout.values()), 0

    def count(written: int) -> None:
        nonlocal done
        done += written
        on_bytes(done, total)

    return count
