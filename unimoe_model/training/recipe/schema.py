"""Dataclasses of a recipe: starting model, encoders, data, stages and evaluations."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from unimoe_model.precision import PRECISIONS
from unimoe_model.prompt import PROMPT_FORMATS
from unimoe_model.training.optimization import Optimization
from unimoe_model.training.recipe.parts import TrainedPart
from unimoe_model.value_types import require_at_least, require_positive

OBJECTIVES = ("answers", "words")
"""Objectives of a stage."""
START = "model"
"""Name in `from` and `experts` of the model that the recipe starts from."""


@dataclass(frozen=True)
class LanguageModel:
    """The model that the first stage starts from.

    Exactly one of `folder`, `llm` and `sizes` is given, or `llm` together with its expected
    `sizes`, so that a recipe can be checked while the LLM is missing.

    Attributes:
        folder: folder of a Uni-MoE.
        llm: an LLM of transformers, as a folder or a name on the Hugging Face hub;
            `unimoe_model.llm_families` lists the model types.
        sizes: fields of the LLM's configuration (`model_type` defaults to `"llama"`); without
            `llm`, weights are initialised randomly.
        tokenizer: folder or hub name of the tokenizer; None for that of the folder or LLM.
        vocab_size: number of entries of a tokenizer trained on the texts of the recipe.
        prompt_format: `"vicuna"` or `"chat"`, see `UniMoEProcessor`; None for that of the folder,
            or `"chat"` if the tokenizer has a chat template.

    Raises:
        ValueError: If the combination is not supported.
    """

    folder: str | None = None
    llm: str | None = None
    sizes: dict[str, Any] | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    prompt_format: str | None = None

    def __post_init__(self):
        given = [n for n in ("folder", "llm", "sizes") if getattr(self, n) is not None]
        if len(given) != 1 and given != ["llm", "sizes"]:
            raise ValueError(f"exactly one of folder, llm and sizes is expected, got {given}")
        if self.prompt_format not in (None, *PROMPT_FORMATS):
            raise ValueError(
                f"prompt_format ({self.prompt_format!r}) must be one of {PROMPT_FORMATS}"
            )
        if self.folder is not None and (self.tokenizer or self.vocab_size):
            raise ValueError(
                "folder has a tokenizer already; tokenizer and vocab_size are for LLMs"
            )
        if self.tokenizer is not None and self.vocab_size is not None:
            raise ValueError("tokenizer and vocab_size exclude each other")
        drawn = self.sizes is not None and self.llm is None
        if drawn and (self.tokenizer is None) == (self.vocab_size is None):
            raise ValueError("sizes requires a tokenizer: a folder, or vocab_size to train one")


@dataclass(frozen=True)
class EncoderNames:
    """The frozen encoders, each by name, folder or `module:Class`; None for those of the model.

    Attributes:
        vision: encoder of images and video frames.
        speech: encoder of speech.
        audio: encoder of other sounds.
    """

    vision: str | None = None
    speech: str | None = None
    audio: str | None = None


@dataclass(frozen=True)
class ConnectorRecipe:
    """The speech or audio connector.

    Attributes:
        queries: soft tokens per piece; None for the default of `UniMoEConfig`.
        max_frames: maximum number of feature frames per piece of speech.
        sizes: fields of `WhisperConfig` (speech) or `Blip2QFormerConfig` (audio).
        pretrained: initialisation of the connector's body: a Whisper (speech) or a BLIP-2 (audio),
            as a folder or hub name; for speech also the `module:Class` of an encoder with class
            methods `decoder_config` and `pretrained_decoder`. None for random weights.
    """

    queries: int | None = None
    max_frames: int | None = None
    sizes: dict[str, Any] | None = None
    pretrained: str | None = None

    def __post_init__(self):
        require_at_least(1, queries=self.queries, max_frames=self.max_frames)
        if self.sizes is not None and self.pretrained is not None:
            raise ValueError(
                "sizes and pretrained exclude each other: pretrained determines the sizes"
            )


@dataclass(frozen=True)
class DataFile:
    """Training samples in a file or in shards, exactly one of which is given.

    Attributes:
        file: path of the file, in a format of `read_conversations`.
        media: folder that media paths are relative to; None for the folder of the file.
        shards: uncompressed tars (`data/shards.py`), as `glob` patterns.
        shuffle: window size in samples for shuffling within windows (`WindowOrder`); None draws
            from all samples at random.
    """

    file: str | None = None
    media: str | None = None
    shards: tuple[str, ...] = ()
    shuffle: int | None = None

    def __post_init__(self):
        if (self.file is None) != bool(self.shards):
            raise ValueError("either file or shards must be given")
        if self.shards and self.media is not None:
            raise ValueError("shards and media exclude each other: shards hold their media")
        require_at_least(1, shuffle=self.shuffle)


@dataclass(frozen=True)
class Assembly:
    """How an MoE model is assembled from earlier stages.

    Attributes:
        experts: stages whose FFNs become the experts, in order; `START` stands for the FFNs of the
            model that the recipe starts from.
        top_k: number of experts per token.
        layers: layers with experts, as `moe_layers` of `UniMoEConfig`.
        router_strength: initial logit of a modality's mean token for its own expert; 0 initialises
            the router randomly.
        connectors: stage to take the connector of each kind from; by default the only expert stage
            that trained it.
        options: further fields of `UniMoEConfig`, such as `load_balancing_coef`.
    """

    experts: tuple[str, ...]
    top_k: int = 2
    layers: str | list[int] = "all"
    router_strength: float = 0.0
    connectors: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.experts:
            raise ValueError("experts must name at least one stage")
        if not 1 <= self.top_k <= len(self.experts):
            raise ValueError(
                f"top_k ({self.top_k}) must be at least 1 and at most the number of experts"
                f" ({len(self.experts)})"
            )
        require_at_least(0, router_strength=self.router_strength)


@dataclass(frozen=True)
class Stage:
    """A stage of training.

    Attributes:
        name: name of the stage and prefix of its folder.
        parent: stage that it starts from, or `START`.
        train: parts that are trained.
        streams: weights of the data in the batches, by name; several streams alternate step by
            step.
        optimization: length, batches and optimiser; with `epochs`, `optimization_for` computes the
            number of steps.
        epochs: number of passes over the data, instead of steps; each sample is seen as many times
            as the weight of its data, which must be an integer.
        part_tokens: maximum tokens per forward pass, padding included; larger batches are split
            into parts whose gradients are accumulated. None for no limit.
        max_length: maximum tokens per sample, soft tokens included; longer samples are truncated.
        pack: whether to pack samples into rows of at most `max_length` tokens.
        assembly: how to assemble experts before training; None keeps the model.
        objective: `"answers"`, the loss of the answers, or `"words"`, which brings soft tokens near
            the embeddings of the answers' words without running the LLM (`word_loss`); the stage
            then trains connectors only.
        distill: names of data, without media, whose answers are not learned: at their tokens the
            model is trained to predict what the model that the recipe starts from predicts
            (`distillation_loss`), which keeps its knowledge.
        distill_weight: factor of that loss.
        widen: factor by which dense FFNs are widened before training, with equal outputs.
        seed: seed of the data order; stages with equal seeds and data see the same batches.

    Raises:
        ValueError: If a value is out of range, or options exclude each other.
    """

    name: str
    parent: str
    train: tuple[TrainedPart, ...]
    streams: tuple[dict[str, float], ...]
    optimization: Optimization
    epochs: float | None = None
    part_tokens: int | None = None
    max_length: int | None = None
    pack: bool = False
    assembly: Assembly | None = None
    objective: str = "answers"
    distill: tuple[str, ...] = ()
    distill_weight: float = 1.0
    widen: int = 1
    seed: int = 0

    def __post_init__(self):
        lengths = {"part_tokens": self.part_tokens, "max_length": self.max_length}
        require_at_least(1, **lengths, widen=self.widen)
        require_at_least(0, seed=self.seed)
        if self.part_tokens and self.optimization.accumulation > 1:
            raise ValueError("accumulation and part_tokens exclude each other")
        if self.pack and self.max_length is None:
            raise ValueError("pack requires max_length, the maximum tokens per row")
        if self.assembly and self.widen > 1:
            raise ValueError("assemble and widen exclude each other")
        self._check_objective()
        self._check_distill()
        if self.epochs is None:
            return
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs ({self.epochs}) must be above 0")
        if len(self.streams) > 1:
            raise ValueError("epochs requires data; data_in_turn has steps")
        for name, weight in self.streams[0].items():
            if weight != int(weight):
                raise ValueError(f"data.{name} ({weight}) must be whole where there are epochs")

    def _check_objective(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"objective ({self.objective!r}) must be one of {', '.join(OBJECTIVES)}"
            )
        if self.objective == "answers":
            return
        if self.pack:
            raise ValueError("objective: words and pack exclude each other")
        others = [
            part.part
            for part in self.train
            if part.part.split(".")[0] not in ("connectors", "projectors")
        ]
        if others:
            raise ValueError(
                f"objective: words trains connectors and projectors; train has {others[0]}"
            )

    def _check_distill(self) -> None:
        if not 0 < self.distill_weight < math.inf:
            raise ValueError(f"distill_weight ({self.distill_weight}) must be above 0")
        if not self.distill:
            if self.distill_weight != 1:
                raise ValueError(f"distill_weight ({self.distill_weight}) requires distill")
            return
        unknown = [name for name in self.distill if name not in self.data]
        if unknown:
            raise ValueError(
                f"distill ({unknown[0]!r}) must be among the data of the stage:"
                f" {', '.join(self.data)}"
            )
        if self.objective != "answers":
            raise ValueError(f"distill and objective: {self.objective} exclude each other")

    def optimization_for(self, samples: Mapping[str, int]) -> Optimization:
        """The optimisation with its number of steps, given the number of samples by data name."""
        if self.epochs is None:
            return self.optimization
        passed = sum(samples[name] * int(weight) for name, weight in self.streams[0].items())
        steps = max(1, math.ceil(self.epochs * passed / self.optimization.batch_size))
        return replace(self.optimization, steps=steps)

    @property
    def sources(self) -> tuple[str, ...]:
        """Stages (or `START`) that this one requires."""
        experts = self.assembly.experts if self.assembly else ()
        kept = self.assembly.connectors.values() if self.assembly else ()
        return tuple(dict.fromkeys((self.parent, *experts, *kept)))

    @property
    def data(self) -> tuple[str, ...]:
        """Names of the data that it trains on."""
        return tuple(dict.fromkeys(name for stream in self.streams for name in stream))


@dataclass(frozen=True)
class Evaluation:
    """An evaluation on held-out questions after some stages.

    Attributes:
        name: name of the evaluation and of its folder.
        data: JSON lines file in the format of `unimoe eval`.
        metric: metric of `unimoe eval`.
        stages: stages to evaluate; empty for the last one.
        max_new_tokens: maximum tokens per output.
        limit: maximum number of questions; None for all.
    """

    name: str
    data: str
    metric: str
    stages: tuple[str, ...] = ()
    max_new_tokens: int = 64
    limit: int | None = None


@dataclass(frozen=True)
class Parallel:
    """Layout of processes that train one model together; it does not affect the result.

    Attributes:
        data: number of groups, each of which holds all experts.
        expert: number of processes per group, which share its experts.
        shard: whether weights, gradients and optimiser states are sharded over all processes
            (FSDP2), those of experts over the groups, and gathered one decoder layer at a time.
        timeout: timeout of collectives in seconds.
    """

    data: int = 1
    expert: int = 1
    shard: bool = False
    timeout: float = 600.0

    def __post_init__(self):
        require_at_least(1, data=self.data, expert=self.expert)
        require_positive(timeout=self.timeout)


@dataclass(frozen=True)
class Recipe:
    """A training run, as read by `load_recipe`.

    Attributes:
        path: path of the recipe, for error messages.
        seed: seed of initial weights and data order.
        precision: `"bf16"`, `"fp32"`, or `"auto"` for bf16 on devices with instructions for it.
        model: the model that the first stage starts from.
        encoders: the frozen encoders.
        speech: the speech connector.
        audio: the audio connector.
        video_frames: frames per video; None for the model's own number.
        data: training data by name.
        stages: stages in order.
        evaluations: evaluations on held-out questions.
        parallel: layout of processes; None for data parallelism over all processes.
        checkpoint_seconds: seconds between checkpoints.
        workers: number of threads that read and tokenize batches.
    """

    path: str
    model: LanguageModel
    data: dict[str, DataFile]
    stages: tuple[Stage, ...]
    seed: int = 0
    precision: str = "auto"
    encoders: EncoderNames = field(default_factory=EncoderNames)
    speech: ConnectorRecipe = field(default_factory=ConnectorRecipe)
    audio: ConnectorRecipe = field(default_factory=ConnectorRecipe)
    video_frames: int | None = None
    evaluations: tuple[Evaluation, ...] = ()
    parallel: Parallel | None = None
    checkpoint_seconds: float = 60.0
    workers: int = 1

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision ({self.precision!r}) must be one of {PRECISIONS}")
        seconds = self.checkpoint_seconds
        require_at_least(0, seed=self.seed, checkpoint_seconds=seconds, workers=self.workers)
        require_at_least(1, video_frames=self.video_frames)
        self._check_processes()

    def _check_processes(self) -> None:
        processes = self.parallel.data * self.parallel.expert if self.parallel else 1
        for stage in self.stages:
            single = "objective (words)" if stage.objective == "words" else "distill"
            if processes > 1 and (stage.objective == "words" or stage.distill):
                raise ValueError(
                    f"stages.{stage.name}.{single} requires a run of one process; this run has"
                    f" {processes}, by parallel or torchrun"
                )

    @property
    def encoder_names(self) -> tuple[str, ...]:
        """Names of the recipe's encoders, and of the one that initialises the speech connector."""
        own = self.encoders
        named = (own.vision, own.speech, own.audio, self.speech.pretrained)
        return tuple(name for name in named if name is not None)

    def stage(self, name: str) -> Stage:
        """The stage with a name.

        Raises:
            ValueError: If there is no such stage.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"stage ({name!r}) must be one of {[s.name for s in self.stages]}")
