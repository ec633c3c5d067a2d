"""Settings of a whole run, read from YAML and checked before anything is built."""

from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml
from transformers import Blip2QFormerConfig, LlamaConfig
from transformers.activations import ACT2FN

from unimoe_model.configuration import MEDIA_KINDS, check_moe_layers
from unimoe_model.data.examples import EVALUATED_TASKS, TASKS
from unimoe_model.data.limits import DataLimits
from unimoe_model.data.tokenizer import LEAST_VOCAB_SIZE
from unimoe_model.precision import PRECISIONS, resolve_precision
from unimoe_model.training.language_model import digest, read_sizes
from unimoe_model.training.optimization import Optimization
from unimoe_model.value_types import fits_type

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "cross_attention_frequency",
)


@dataclass(frozen=True)
class StageSettings:
    """One stage: its optimiser and the share of each task in its batches."""

    optimizer: Optimization
    tasks: dict[str, float]


@dataclass(frozen=True)
class ModelSettings:
    """Sizes of the model.

    Attributes:
        text: fields of `LlamaConfig`; `intermediate_size` is the width of one expert. Left out of
            a file that names a `language_model`, like `vocab_size`.
        vocab_size: entries of the tokenizer that is trained.
        top_k: experts a token is routed to.
        moe_layers: which layers hold experts, as in `UniMoEConfig`.
        load_balancing_coef: weight of the load-balancing loss.
        speech_max_frames: feature rows of a speech clip.
        speech_num_queries: soft tokens of a speech clip.
        audio_num_queries: soft tokens of an audio clip.
        audio_connector: fields of `Blip2QFormerConfig`.
    """

    text: dict[str, Any]
    vocab_size: int
    top_k: int
    speech_max_frames: int
    speech_num_queries: int
    audio_num_queries: int
    audio_connector: dict[str, Any]
    moe_layers: str | list[int] = "all"
    load_balancing_coef: float = 0.0

    def __post_init__(self):
        text = _transformers_config("text", self.text, LlamaConfig)
        _transformers_config("audio_connector", self.audio_connector, Blip2QFormerConfig)
        check_moe_layers(self.moe_layers, text.num_hidden_layers)
        _check_least(self, LEAST_VOCAB_SIZE, "vocab_size")
        _check_least(self, 1, "speech_max_frames", "speech_num_queries", "audio_num_queries")
        _check_least(self, 0, "load_balancing_coef")


@dataclass(frozen=True)
class ParallelSettings:
    """Processes that train one model together; they decide how fast, not what, is computed.

    Attributes:
        data: groups of processes that hold all experts together.
        expert: processes that share the experts of a group.
        timeout: seconds after which processes give up waiting for one that does not come.
    """

    data: int = 1
    expert: int = 1
    timeout: float = 600.0

    def __post_init__(self):
        _check_least(self, 1, "data", "expert")
        if not self.timeout > 0:
            raise ValueError(f"timeout ({self.timeout}) must be above 0")


@dataclass(frozen=True)
class RunSettings:
    """Everything that decides what a run computes.

    Attributes:
        seed: of initial weights, data order and held-out samples.
        precision: `"bf16"`, `"fp32"`, or `"auto"`: bf16 where the device has instructions for it.
        model: sizes.
        pretrain: the LLM on text, from random weights; None with a `language_model`.
        language_model: folder of a pretrained LLM that both models start from, instead of
            `pretrain`. They then share stage 1, and the dense model is this LLM with every FFN
            `top_k` times as wide.
        align: stage 1.
        experts: stage 2, one entry a media kind.
        tune: stage 3.
        router_strength: logit that a modality's mean token starts with at its own expert in stage
            3 (see `router_weights`); 0 leaves the router's random start.
        expert_lora_rank: of stage 2, on the FFNs.
        expert_lora_alpha: of stage 2.
        lora_rank: of stage 3, on attention and experts.
        lora_alpha: of stage 3.
        data: most items of each media set that are encoded for training.
        evaluation: most held-out items of each task; a task that is not named takes all.
        parallel: number of processes that torchrun starts; None is one process without it.
    """

    seed: int
    precision: str
    model: ModelSettings
    align: StageSettings
    experts: dict[str, StageSettings]
    tune: StageSettings
    expert_lora_rank: int
    expert_lora_alpha: int
    lora_rank: int
    lora_alpha: int
    pretrain: StageSettings | None = None
    language_model: str | None = None
    router_strength: float = 0.0
    data: DataLimits = field(default_factory=DataLimits)
    evaluation: dict[str, int] = field(default_factory=dict)
    parallel: ParallelSettings | None = None

    def __post_init__(self):
        if (self.pretrain is None) == (self.language_model is None):
            raise ValueError(
                "pretrain and language_model: exactly one of them must be given, to say where the"
                " language model comes from"
            )
        unknown = sorted(self.experts.keys() - set(MEDIA_KINDS))
        if unknown or not self.experts:
            raise ValueError(f"experts ({unknown or 'none'}) must be among {MEDIA_KINDS}")
        sizes = {s.optimizer.steps for s in self.experts.values()}
        if len(sizes) > 1:
            raise ValueError(f"experts must all have the same number of steps, got {sizes}")
        if not 1 <= self.model.top_k <= len(self.experts):
            raise ValueError(
                f"model.top_k ({self.model.top_k}) must be at least 1 and at most the number of"
                f" experts ({len(self.experts)})"
            )
        _check_least(self, 0, "seed", "router_strength")
        _check_least(self, 1, "expert_lora_rank", "expert_lora_alpha", "lora_rank", "lora_alpha")
        unknown = sorted(self.evaluation.keys() - set(EVALUATED_TASKS))
        if unknown:
            raise ValueError(f"evaluation ({unknown}) must be among {EVALUATED_TASKS}")
        for task, most in self.evaluation.items():
            if most < 1:
                raise ValueError(f"evaluation.{task} ({most}) must be at least 1")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision ({self.precision!r}) must be 'auto', 'bf16' or 'fp32'")
        if self.parallel is not None and len(self.experts) % self.parallel.expert:
            raise ValueError(
                f"parallel.expert ({self.parallel.expert}) must divide the number of experts"
                f" ({len(self.experts)})"
            )

    def result_facts(self) -> dict[str, Any]:
        """All fields that decide the result, as plain values; `parallel` does not.

        Raises:
            ValueError: If the files of `language_model` cannot be read.
        """
        facts = asdict(self)
        del facts["parallel"]
        if self.language_model is not None:
            facts["language_model"] = digest(Path(self.language_model))
        return facts

    def resolved_precision(self, device: torch.device) -> str:
        """`"bf16"` or `"fp32"`, with `"auto"` decided for `device` (`resolve_precision`)."""
        return resolve_precision(self.precision, device)


def load_settings(path: str | Path, **overrides: Any) -> RunSettings:
    """Reads a YAML file of settings.

    Args:
        path: the file; `configs/tiny.yaml` is the example.
        **overrides: top-level values that replace the file's, such as `seed=1`.

    Raises:
        ValueError: If the file is missing or no YAML, or a key is unknown, missing or wrong.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config ({path}) must be a readable YAML file: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"config ({path}) must be a mapping, got {type(raw).__name__}")
    raw |= overrides
    for name in ("pretrain", "align", "tune"):
        if name in raw and (name, raw[name]) != ("pretrain", None):
            raw[name] = _stage(raw[name], path, name)
    if isinstance(raw.get("experts"), dict):
        raw["experts"] = {
            kind: _stage(value, path, f"experts.{kind}") for kind, value in raw["experts"].items()
        }
    if isinstance(raw.get("language_model"), str):
        _take_language_model(raw, Path(path))
    if "model" in raw:
        raw["model"] = _build(ModelSettings, raw["model"], path, "model")
    if "data" in raw:
        raw["data"] = _build(DataLimits, raw["data"], path, "data")
    if raw.get("parallel") is not None:
        raw["parallel"] = _build(ParallelSettings, raw["parallel"], path, "parallel")
    return _build(RunSettings, raw, path)


def _take_language_model(raw: dict[str, Any], path: Path) -> None:
    """Fills in the folder, from the file's own, and the sizes that the LLM in it has."""
    folder = path.parent / raw["language_model"]
    raw["language_model"] = str(folder)
    model = dict(_mapping(raw.get("model"), f"{path}: model"))
    given = sorted({"text", "vocab_size"} & model.keys())
    if given:
        raise ValueError(f"{path}: model.{given[0]} must be left out: language_model decides it")
    try:
        model["text"], model["vocab_size"] = read_sizes(folder)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    raw["model"] = model


def _transformers_config(name: str, values: dict[str, Any], config_class: type):
    """Builds a configuration of transformers, only to have the fields checked."""
    unknown = sorted(values.keys() - {f.name for f in fields(config_class)})
    if unknown:
        raise ValueError(f"{name} has unknown keys {unknown}, not of {config_class.__name__}")
    for key, value in values.items():
        if isinstance(value, int) and not isinstance(value, bool) and key in _SIZES and value < 1:
            raise ValueError(f"{name}.{key} ({value}) must be at least 1")
    try:
        config = config_class(**values)
    except Exception as error:  # transformers' own are of a package that it brings along
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{name} must be fields of a {config_class.__name__}: {reason}") from error
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{name}.hidden_size ({config.hidden_size}) must be a multiple of"
            f" num_attention_heads ({config.num_attention_heads})"
        )
    if config.hidden_act not in ACT2FN:
        raise ValueError(
            f"{name}.hidden_act ({config.hidden_act!r}) must be an activation of transformers,"
            " such as 'silu'"
        )
    return config


def _check_least(settings: Any, least: float, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not value >= least:
            raise ValueError(f"{name} ({value}) must be at least {least}")


def _stage(raw: Any, path: str | Path, key: str) -> StageSettings:
    where = f"{path}: {key}"
    raw = dict(_mapping(raw, where))
    tasks = raw.pop("tasks", None)
    if not isinstance(tasks, dict) or not tasks:
        raise ValueError(f"{where}.tasks ({tasks}) must be a mapping of task to weight")
    for task, weight in tasks.items():
        if not fits_type(weight, float) or not weight > 0:
            raise ValueError(f"{where}.tasks.{task} ({weight!r}) must be a positive number")
    unknown = sorted(tasks.keys() - set(TASKS))
    if unknown:
        raise ValueError(f"{where}.tasks has unknown keys {unknown}; known are {sorted(TASKS)}")
    return StageSettings(_build(Optimization, raw, path, key), tasks)


def _build(cls: type, raw: Any, path: str | Path, key: str = ""):
    where = f"{path}: {key}" if key else str(path)
    raw = _mapping(raw, where)
    known = {f.name for f in fields(cls)}
    unknown = sorted(raw.keys() - known)
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}; known are {sorted(known)}")
    missing = sorted(
        f.name
        for f in fields(cls)
        if f.default is MISSING and f.default_factory is MISSING and f.name not in raw
    )
    if missing:
        raise ValueError(f"{where} lacks the keys {missing}")
    for name, wanted in get_type_hints(cls).items():
        if name in raw and not fits_type(raw[name], wanted):
            expected = getattr(wanted, "__name__", str(wanted))
            inner = f"{key}.{name}" if key else name
            raise ValueError(f"{path}: {inner} ({raw[name]!r}) must be of type {expected}")
    try:
        return cls(**raw)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _mapping(raw: Any, where: str) -> dict:
    if not isinstance(raw, dict):
        raise ValueError(f"{where} ({raw!r}) must be a mapping")
    return raw
