"""Dataclasses of a stage of training, and of the experts that it is assembled from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from unimoe_model.training.optimization import Optimization
from unimoe_model.training.recipe.parts import TrainedPart
from unimoe_model.value_types import require_at_least

OBJECTIVES = ("answers", "words")
ASSEMBLY_OPTIONS = (
    "load_balancing_coef",
    "router_z_coef",
    "modality_expert_coef",
    "modality_experts",
    "modality_kl_coef",
    "moe_options",
)
"""Fields of `UniMoEConfig` that an assembly can set."""
"""Objectives of a stage."""
START = "model"
"""Name in `from` and `experts` of the model that the recipe starts from."""


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
        options: further fields of `UniMoEConfig`, those of `ASSEMBLY_OPTIONS`.

    Raises:
        ValueError: If a value is out of range, or an option is unknown or not supported.
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
        unknown = [name for name in self.options if name not in ASSEMBLY_OPTIONS]
        if unknown:
            raise ValueError(
                f"options has an unknown key {unknown[0]!r}; there are"
                f" {', '.join(ASSEMBLY_OPTIONS)}"
            )
        moe_options = self.options.get("moe_options")
        if isinstance(moe_options, dict) and moe_options.get("correction_bias"):
            raise ValueError(
                "options.moe_options.correction_bias is not supported: training does not update it"
            )


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
            the embeddings of the answers' tokens without running the LLM (`word_loss`); the stage
            then trains connectors only.
        distill: names of data, without media, whose answers are not learned: at all of their tokens
            the model is trained to predict what the model that the recipe starts from predicts
            (`distillation_loss`), which keeps its knowledge.
        distill_weight: factor of the mean of that loss.
        image_dropout: probability with which a channel of an image's or video's features is dropped
            in training (`drop_image_channels`).
        widen: factor by which dense FFNs are widened before training, with equal outputs; the new
            width is rounded to an integer.
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
    image_dropout: float = 0.0
    widen: float = 1
    seed: int = 0

    def __post_init__(self):
        lengths = {"part_tokens": self.part_tokens, "max_length": self.max_length}
        require_at_least(1, **lengths, widen=self.widen)
        if self.widen == math.inf:
            raise ValueError(f"widen ({self.widen}) must be finite")
        require_at_least(0, seed=self.seed)
        if not 0 <= self.image_dropout < 1:
            raise ValueError(
                f"image_dropout ({self.image_dropout}) must be at least 0 and less than 1"
            )
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
        # Its second term is a mean over the soft tokens of the whole batch.
        for name, value in (
            ("accumulation", self.optimization.accumulation),
            ("part_tokens", self.part_tokens or 1),
        ):
            if value > 1:
                raise ValueError(f"objective: words and {name} ({value}) exclude each other")
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
