"""What a recipe says: where a model starts, its encoders, its stages and their data."""

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
"""What a stage may learn from its data."""
START = "model"
"""What `from` of a stage calls the model that the recipe starts from."""


@dataclass(frozen=True)
class LanguageModel:
    """The model that the first stage starts from.

    One of `folder`, `llm` and `sizes` is given, or `llm` with the `sizes` that it is expected to
    have, so that a recipe can be checked while the LLM is not there.

    Attributes:
        folder: a Uni-MoE in the layout of transformers.
        llm: an LLM of transformers, as a folder or a name of the Hugging Face hub;
            `unimoe_model.llm_families` has the model types.
        sizes: fields of the LLM's configuration, of a LLaMA without `model_type`; without `llm`
            for weights drawn anew.
        tokenizer: folder or hub name of the tokenizer; None is that of the folder or LLM.
        vocab_size: entries of a tokenizer that is trained on the texts of the recipe.
        prompt_format: `"vicuna"` or `"chat"`, see `UniMoEProcessor`; None is that of the folder, or
            `"chat"` where the tokenizer has a chat template.
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
    """The frozen encoders, each by name, folder or `module:Class`; None keeps the model's own."""

    vision: str | None = None
    speech: str | None = None
    audio: str | None = None


@dataclass(frozen=True)
class ConnectorRecipe:
    """The speech or audio connector.

    Attributes:
        queries: soft tokens of a piece; None keeps the default of `UniMoEConfig`.
        max_frames: feature rows of a piece of speech.
        sizes: fields of `WhisperConfig` (speech) or `Blip2QFormerConfig` (audio).
        pretrained: where the connector's body starts: a Whisper (speech) or a BLIP-2 (audio) of
            transformers as a folder or hub name; for speech also the `module:Class` of an encoder
            with class methods `decoder_config` and `pretrained_decoder`; None is random.
    """

    queries: int | None = None
    max_frames: int | None = None
    sizes: dict[str, Any] | None = None
    pretrained: str | None = None

    def __post_init__(self):
        require_at_least(1, queries=self.queries, max_frames=self.max_frames)
        if self.sizes is not None and self.pretrained is not None:
            raise ValueError(
                "sizes and pretrained exclude each other: pretrained decides the sizes"
            )


@dataclass(frozen=True)
class DataFile:
    """Training samples in a file or in shards, one of which is given.

    Attributes:
        file: the file, relative to the recipe; `read_conversations` says which formats there are.
        media: folder that media paths are relative to; None is that of the file.
        shards: uncompressed tars (`data/shards.py`), as patterns of `glob`.
        shuffle: samples of a window within which they are shuffled (`WindowOrder`); None draws from
            all of them at random.
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
    """How experts are made of stages.

    Attributes:
        experts: stages whose FFNs become the experts, in order; `START` is among them for the FFNs
            of the model that the recipe starts from.
        top_k: experts a token is routed to.
        layers: which layers hold experts, as `moe_layers` of `UniMoEConfig`.
        router_strength: logit of a modality's mean token at its own expert; 0 draws the router at
            random.
        connectors: stage that the connector of a kind is taken from, by kind; what is not named is
            taken from the one expert stage that trained it.
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
    """One stage.

    Attributes:
        name: names it in the recipe and its folder.
        parent: stage that it starts from, or `START`.
        train: what is trained.
        streams: weights of the data in the batches; several streams take turns, a step each.
        optimization: length, batches and optimiser; with `epochs`, `optimization_for` says how many
            steps there are.
        epochs: passes over the data instead of steps, every sample as often as the weight of its
            data says, which must be a whole number then.
        part_tokens: most tokens, padding included, that go through the model at once; a batch with
            more is cut into parts whose gradients are added up. None leaves it whole.
        max_length: most tokens of a sample, soft ones included; what is beyond is cut off.
        pack: puts samples together into rows of at most `max_length` tokens.
        assembly: makes experts before training; None leaves the model as it is.
        objective: `"answers"`, what the model says, or `"words"`: soft tokens come near the
            embeddings of the answer's words (`word_loss`); the LLM does not run, and the stage
            trains connectors.
        widen: makes every dense FFN so many times as wide before training, with equal outputs.
        seed: of the data order; stages with equal seeds and data see the same batches.
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
    widen: int = 1
    seed: int = 0

    def __post_init__(self):
        lengths = {"part_tokens": self.part_tokens, "max_length": self.max_length}
        require_at_least(1, **lengths, widen=self.widen)
        require_at_least(0, seed=self.seed)
        if self.part_tokens and self.optimization.accumulation > 1:
            raise ValueError("accumulation and part_tokens exclude each other")
        if self.pack and self.max_length is None:
            raise ValueError("pack requires max_length, the most tokens of a row")
        if self.assembly and self.widen > 1:
            raise ValueError("assemble and widen exclude each other")
        self._check_objective()
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

    def optimization_for(self, samples: Mapping[str, int]) -> Optimization:
        """The optimisation with the steps that it has over data of so many samples each."""
        if self.epochs is None:
            return self.optimization
        passed = sum(samples[name] * int(weight) for name, weight in self.streams[0].items())
        steps = max(1, math.ceil(self.epochs * passed / self.optimization.batch_size))
        return replace(self.optimization, steps=steps)

    @property
    def sources(self) -> tuple[str, ...]:
        """Stages (or `START`) that must be there before this one can begin."""
        experts = self.assembly.experts if self.assembly else ()
        kept = self.assembly.connectors.values() if self.assembly else ()
        return tuple(dict.fromkeys((self.parent, *experts, *kept)))

    @property
    def data(self) -> tuple[str, ...]:
        """Names of the data that it trains on."""
        return tuple(dict.fromkeys(name for stream in self.streams for name in stream))


@dataclass(frozen=True)
class Evaluation:
    """Held-out questions that a stage's model is asked when it is done.

    Attributes:
        name: names its folder.
        data: file of JSON lines, as `unimoe eval` reads it.
        metric: of `unimoe eval`.
        stages: after which; empty is the last one.
        max_new_tokens: longest output.
        limit: only the first so many questions.
    """

    name: str
    data: str
    metric: str
    stages: tuple[str, ...] = ()
    max_new_tokens: int = 64
    limit: int | None = None


@dataclass(frozen=True)
class Parallel:
    """Processes that train one model together; they decide how fast, not what, is computed.

    Attributes:
        data: groups of processes that hold all experts together.
        expert: processes that share the experts of a group.
        shard: whether weights, gradients and optimiser states are divided among all processes
            (FSDP2), those of experts among the groups, and gathered one decoder layer at a time.
        timeout: seconds after which processes give up waiting for one that does not come.
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
    """A whole run; `load_recipe` reads one.

    Attributes:
        path: the file, for errors.
        seed: of initial weights and data order.
        precision: `"bf16"`, `"fp32"`, or `"auto"`: bf16 where the device has instructions for it.
        model: where the first stage starts.
        encoders: the frozen encoders.
        speech: the speech connector.
        audio: the audio connector.
        video_frames: frames of a video; None keeps the model's own number.
        data: files by name.
        stages: in order.
        evaluations: held-out questions.
        parallel: processes; None is one.
        checkpoint_seconds: time between checkpoints.
        workers: threads that read and tokenise batches beside training.
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
        words = [stage.name for stage in self.stages if stage.objective == "words"]
        if words and self.parallel:
            raise ValueError(
                f"stages.{words[0]}.objective (words) and parallel exclude each other; train the"
                " stage by a run of one process"
            )

    @property
    def encoder_names(self) -> tuple[str, ...]:
        """Encoders that the recipe names, those that connectors start from included."""
        own = self.encoders
        named = (own.vision, own.speech, own.audio, self.speech.pretrained)
        return tuple(name for name in named if name is not None)

    def stage(self, name: str) -> Stage:
        """The stage of a name.

        Raises:
            ValueError: If there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"stage ({name!r}) must be one of {[s.name for s in self.stages]}")
