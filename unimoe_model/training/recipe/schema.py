"""Dataclasses of a recipe: starting model, encoders, data, evaluations and processes."""

from dataclasses import dataclass, field
from typing import Any

from unimoe_model.precision import PRECISIONS
from unimoe_model.prompt import PROMPT_FORMATS
from unimoe_model.training.recipe.stage import Stage
from unimoe_model.value_types import require_at_least, require_positive


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
class ImageConnectorRecipe:
    """The connector of images and videos.

    Attributes:
        intermediate_size: width of the hidden layer; None for the width of the LLM.
        pooled_tokens: soft tokens of the mean of the patches; None for a soft token per patch.
    """

    intermediate_size: int | None = None
    pooled_tokens: int | None = None

    def __post_init__(self):
        require_at_least(
            1, intermediate_size=self.intermediate_size, pooled_tokens=self.pooled_tokens
        )


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
        image: the connector of images and videos.
        speech: the speech connector.
        audio: the audio connector.
        vocabulary_sharpness: see `UniMoEConfig`; the key `connectors.vocabulary_sharpness`.
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
    image: ImageConnectorRecipe = field(default_factory=ImageConnectorRecipe)
    speech: ConnectorRecipe = field(default_factory=ConnectorRecipe)
    audio: ConnectorRecipe = field(default_factory=ConnectorRecipe)
    vocabulary_sharpness: float | None = None
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
        require_positive(**{"connectors.vocabulary_sharpness": self.vocabulary_sharpness})
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
