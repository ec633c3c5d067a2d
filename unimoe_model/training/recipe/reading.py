"""Reads a recipe and checks everything that depends on the file alone."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from unimoe_model.configuration import UniMoEConfig
from unimoe_model.training.optimization import Optimization
from unimoe_model.training.recipe.parts import CONNECTORS, TrainedPart
from unimoe_model.training.recipe.schema import (
    ConnectorRecipe,
    DataFile,
    EncoderNames,
    Evaluation,
    ImageConnectorRecipe,
    LanguageModel,
    Parallel,
    Recipe,
)
from unimoe_model.training.recipe.shard_names import shard_patterns
from unimoe_model.training.recipe.stage import START, Assembly, Stage
from unimoe_model.value_types import fits_type
from unimoe_model.yaml_values import (
    build,
    read_mapping,
    refuse_unknown,
    require_mapping,
    shortened,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_STAGE_KEYS = (
    "name",
    "from",
    "train",
    "objective",
    "distill",
    "distill_weight",
    "image_dropout",
    "data",
    "data_in_turn",
    "assemble",
    "widen",
    "seed",
    "pack",
)
_SHARPNESS = "vocabulary_sharpness"
_LORA_KEYS = ("lora", "alpha", "dropout", "layers")


def load_recipe(path: str | Path, **overrides: Any) -> Recipe:
    """Reads and checks a recipe; `docs/training.md` documents its keys.

    Args:
        path: YAML file. Paths in it are relative to its folder.
        **overrides: top-level values that replace those of the file, such as `seed=1`.

    Raises:
        ValueError: If the file is missing or not YAML, or a key is unknown, missing or invalid; the
            message names file, key, value and what was expected.
    """
    path = Path(path)
    raw = read_mapping(path, "recipe") | overrides
    try:
        return _recipe(raw, path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _recipe(raw: dict[str, Any], path: Path) -> Recipe:
    own = ("connectors", "evaluate")
    known = {f.name for f in fields(Recipe)} - {"path", "evaluations", *CONNECTORS, _SHARPNESS}
    refuse_unknown(raw, (*sorted(known), *own), "")
    values = {key: value for key, value in raw.items() if key not in own}
    for key in ("model", "data", "stages"):
        if not raw.get(key):
            raise ValueError(f"{key} is missing; a recipe must have model, data and stages")
    values["model"] = _language_model(raw["model"], path.parent)
    values["encoders"] = _encoders(raw.get("encoders"), path.parent)
    connectors = dict(require_mapping(raw.get("connectors") or {}, "connectors"))
    refuse_unknown(connectors, (*CONNECTORS, _SHARPNESS), "connectors")
    values[_SHARPNESS] = connectors.pop(_SHARPNESS, None)
    for kind, value in connectors.items():
        if kind == "image":
            values[kind] = build(ImageConnectorRecipe, value, "connectors.image")
            continue
        connector = build(ConnectorRecipe, value, f"connectors.{kind}")
        if kind == "audio" and connector.max_frames is not None:
            raise ValueError("connectors.audio.max_frames is not supported; it is for speech")
        if connector.pretrained is not None:
            place = _local(connector.pretrained, path.parent)
            connector = replace(connector, pretrained=place)
        values[kind] = connector
    values["data"] = _data(raw["data"], path.parent)
    values["stages"] = _stages(raw["stages"], tuple(values["data"]))
    names = [stage.name for stage in values["stages"]]
    values["evaluations"] = _evaluations(raw.get("evaluate") or {}, path.parent, names)
    if raw.get("parallel") is not None:
        values["parallel"] = build(Parallel, raw["parallel"], "parallel")
    return build(Recipe, {**values, "path": str(path)}, "")


def _language_model(raw: Any, folder: Path) -> LanguageModel:
    if isinstance(raw, str):
        raw = {_model_type(raw, folder): raw}
    raw = dict(require_mapping(raw, "model"))
    for key in ("folder", "llm", "tokenizer"):
        if isinstance(raw.get(key), str):
            raw[key] = _local(raw[key], folder)
    return build(LanguageModel, raw, "model")


def _model_type(name: str, folder: Path) -> str:
    """Returns `"folder"` for a Uni-MoE, `"llm"` for another model or a hub name."""
    place = Path(_local(name, folder))
    if not place.exists():
        return "llm"
    try:
        kind = json.loads((place / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model ({name}) must hold the config.json of a model: {error}") from error
    return "folder" if kind == UniMoEConfig.model_type else "llm"


def _encoders(raw: Any, folder: Path) -> EncoderNames:
    names = build(EncoderNames, raw or {}, "encoders")
    found = {f.name: getattr(names, f.name) for f in fields(names)}
    return EncoderNames(**{sense: name and _local(name, folder) for sense, name in found.items()})


def _local(name: str, folder: Path) -> str:
    """The path relative to the recipe's folder if it exists, else the name unchanged."""
    path = (folder / name).resolve()
    return str(path) if name.startswith(".") or path.exists() else name


def _data(raw: Any, folder: Path) -> dict[str, DataFile]:
    found = {}
    for name, value in require_mapping(raw, "data").items():
        where = f"data.{name}"
        value = {"file": value} if isinstance(value, str) else dict(require_mapping(value, where))
        if "shards" in value:
            value["shards"] = _shards(value["shards"], folder, where)
        file = build(DataFile, value, where)
        places = {key: getattr(file, key) for key in ("file", "media")}
        places = {key: path and str(folder / path) for key, path in places.items()}
        found[str(name)] = replace(file, **places)
    return found


def _shards(raw: Any, folder: Path, where: str) -> tuple[str, ...]:
    names = _names(raw, f"{where}.shards", "tars")
    try:
        return shard_patterns(names, folder)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error


def _stages(raw: Any, data: tuple[str, ...]) -> tuple[Stage, ...]:
    if not isinstance(raw, list):
        raise ValueError(f"stages ({shortened(raw)}) must be a list of stages")
    stages: list[Stage] = []
    for number, value in enumerate(raw):
        where = f"stages[{number}]"
        value = require_mapping(value, where)
        name = value.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name == START:
            raise ValueError(
                f"{where}.name ({name!r}) must be letters, digits, '.', '-' and '_', and not"
                f" {START!r}"
            )
        if name in [stage.name for stage in stages]:
            raise ValueError(f"{where}.name ({name}) must be unique; another stage has this name")
        stages.append(_stage(value, name, number, stages, data))
    return tuple(stages)


def _stage(
    raw: dict[str, Any], name: str, number: int, earlier: list[Stage], data: tuple[str, ...]
) -> Stage:
    where = f"stages.{name}"
    lengths = ("steps", "epochs", "part_tokens", "max_length")
    settings = [f.name for f in fields(Optimization) if f.name not in lengths]
    refuse_unknown(raw, (*_STAGE_KEYS, *lengths, *settings), where)
    names = [stage.name for stage in earlier]
    assembly = _assembly(raw.get("assemble"), f"{where}.assemble", names)
    parent = raw.get("from")
    if parent is None:
        parent = _parent(assembly, earlier, where)
    elif parent not in (START, *names):
        raise ValueError(
            f"{where}.from ({parent!r}) must be an earlier stage or {START!r}: {[START, *names]}"
        )
    if ("steps" in raw) == ("epochs" in raw):
        raise ValueError(f"{where} must have either steps or epochs")
    optimization = {key: raw[key] for key in settings if key in raw}
    optimization["steps"] = raw.get("steps", 1)
    values = {key: raw[key] for key in ("epochs", "part_tokens", "max_length") if key in raw}
    plain = ("objective", "distill_weight", "image_dropout", "widen", "seed", "pack")
    values |= {key: raw[key] for key in plain if key in raw}
    if "distill" in raw:
        values["distill"] = _names(raw["distill"], f"{where}.distill", "data")
    values |= {
        "name": name,
        "parent": parent,
        "train": _trained(raw.get("train"), f"{where}.train"),
        "streams": _streams(raw, where, data),
        "optimization": build(Optimization, optimization, where),
        "assembly": assembly,
    }
    return build(Stage, {"seed": number + 1} | values, where)


def _names(raw: Any, where: str, of: str) -> tuple[str, ...]:
    names = [raw] if isinstance(raw, str) else raw
    if not fits_type(names, list[str]):
        raise ValueError(f"{where} ({shortened(raw)}) must be a name of {of} or a list of them")
    return tuple(dict.fromkeys(names))


def _parent(assembly: Assembly | None, earlier: list[Stage], where: str) -> str:
    if assembly is None:
        return earlier[-1].name if earlier else START
    parents = {stage.parent for stage in earlier if stage.name in assembly.experts} or {START}
    if len(parents) > 1:
        raise ValueError(
            f"{where}.from is missing: the experts start from several stages {sorted(parents)}, so"
            " it must name the one whose attention and embeddings are used"
        )
    return parents.pop()


def _assembly(raw: Any, where: str, names: list[str]) -> Assembly | None:
    if raw is None:
        return None
    raw = dict(require_mapping(raw, where))
    experts = raw.get("experts")
    if not isinstance(experts, list) or not experts:
        raise ValueError(f"{where}.experts ({experts!r}) must be a list of earlier stages")
    raw["experts"] = tuple(experts)
    unknown = [name for name in experts if name not in (START, *names)]
    if unknown:
        raise ValueError(
            f"{where}.experts ({unknown[0]!r}) must be an earlier stage or {START!r}: {names}"
        )
    for kind, name in require_mapping(raw.get("connectors", {}), f"{where}.connectors").items():
        if kind not in CONNECTORS or name not in names:
            raise ValueError(
                f"{where}.connectors ({kind}: {name}) must give each of {', '.join(CONNECTORS)} an"
                f" earlier stage: {names}"
            )
    return build(Assembly, raw, where)


def _trained(raw: Any, where: str) -> tuple[TrainedPart, ...]:
    if isinstance(raw, str):
        raw = [raw]
    if isinstance(raw, list):
        raw = dict.fromkeys(raw, "whole")
    if not isinstance(raw, dict) or not raw:
        raise ValueError(f"{where} ({shortened(raw)}) must name the parts that are trained")
    parts = []
    for part, how in raw.items():
        place = f"{where}.{part}"
        if how != "whole":
            how = require_mapping(how, place)
            refuse_unknown(how, _LORA_KEYS, place)
            if not fits_type(how.get("lora"), int) or how["lora"] < 1:
                raise ValueError(f"{place}.lora ({how.get('lora')!r}) must be a rank of at least 1")
            alpha = how.get("alpha", how["lora"])
            layers = how.get("layers", [])
            if not fits_type(layers, list[int]):
                raise ValueError(f"{place}.layers ({shortened(layers)}) must be a list of layers")
            limited = {"layers": tuple(layers)} if "layers" in how else {}
            dropout = how.get("dropout", 0.0)
            how = {"rank": how["lora"], "alpha": alpha, "dropout": dropout, **limited}
        parts.append(build(TrainedPart, {"part": part, **({} if how == "whole" else how)}, where))
    adapted = {part.part for part in parts if part.rank}
    whole = {part.part for part in parts if not part.rank} & {"all", "language_model"}
    if adapted and whole:
        raise ValueError(
            f"{where}: lora for {adapted.pop()} is not supported with {whole.pop()}, which is"
            " trained whole"
        )
    return tuple(parts)


def _streams(raw: dict[str, Any], where: str, known: tuple[str, ...]) -> tuple[dict, ...]:
    if ("data" in raw) == ("data_in_turn" in raw):
        raise ValueError(f"{where} must have either data or data_in_turn")
    key = "data" if "data" in raw else "data_in_turn"
    streams = [raw["data"]] if key == "data" else raw[key]
    if not isinstance(streams, list) or not streams:
        raise ValueError(f"{where}.{key} ({shortened(streams)}) must be a list of mixtures")
    found = []
    for stream in streams:
        if isinstance(stream, str):
            stream = [stream]
        if isinstance(stream, list):
            stream = dict.fromkeys(stream, 1)
        if not isinstance(stream, dict) or not stream:
            raise ValueError(f"{where}.{key} ({shortened(stream)}) must name data with weights")
        for name, weight in stream.items():
            if name not in known:
                raise ValueError(f"{where}.{key} ({name!r}) must be among data: {list(known)}")
            if not fits_type(weight, float) or not 0 < weight < float("inf"):
                raise ValueError(f"{where}.{key}.{name} ({weight!r}) must be a positive weight")
        found.append(dict(stream))
    return tuple(found)


def _evaluations(raw: Any, folder: Path, names: list[str]) -> tuple[Evaluation, ...]:
    from unimoe_model.evaluation.metrics import METRICS

    found = []
    for name, value in require_mapping(raw, "evaluate").items():
        where = f"evaluate.{name}"
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"evaluate ({name!r}) must be letters, digits, '.', '-' and '_'")
        value = dict(require_mapping(value, where))
        after = value.get("stages") or names[-1:]
        value["stages"] = tuple([after] if isinstance(after, str) else after)
        unknown = [stage for stage in value["stages"] if stage not in names]
        if unknown:
            raise ValueError(f"{where}.stages ({unknown[0]!r}) must be among {names}")
        evaluation = build(Evaluation, {**value, "name": name}, where)
        if evaluation.metric not in METRICS:
            raise ValueError(
                f"{where}.metric ({evaluation.metric!r}) must be one of {', '.join(METRICS)}"
            )
        found.append(replace(evaluation, data=str(folder / evaluation.data)))
    return tuple(found)
