"""Parts of the model that a stage trains, each whole or with LoRA."""

import re
from dataclasses import dataclass

_LAYER = r"model\.language_model\.layers\.\d+\."
CONNECTORS = ("image", "speech", "audio")
"""Kinds of connectors; videos use the connector of images."""

PARTS = {
    "connectors": r"model\.\w+_connector\..*",
    **{f"connectors.{kind}": rf"model\.{kind}_connector\..*" for kind in CONNECTORS},
    "projectors": r"model\.\w+_connector\.projector\..*",
    **{f"projectors.{kind}": rf"model\.{kind}_connector\.projector\..*" for kind in CONNECTORS},
    "ffn": rf"{_LAYER}mlp\.(gate|up|down)_proj\..*",
    "experts": rf"{_LAYER}mlp\.(experts|shared_experts)\..*",
    "router": rf"{_LAYER}(mlp\.(router|gate|shared_gate)|modality_gate)\..*",
    "attention": rf"{_LAYER}self_attn\..*",
    "embeddings": r"model\.language_model\.embed_tokens\..*|lm_head\..*",
    "language_model": r"model\.language_model\..*|lm_head\..*",
    "all": r".*",
}
"""Parameters of each part, as a regular expression for their full names."""

LORA_LINEARS = {
    "ffn": rf"{_LAYER}mlp\.(gate|up|down)_proj",
    "attention": rf"{_LAYER}self_attn\.[qkvo]_proj",
}
"""Linear modules that LoRA is attached to, by part; LoRA of `experts` uses stacked weights."""
LORA_PARTS = (*LORA_LINEARS, "experts")


@dataclass(frozen=True)
class TrainedPart:
    """A part of the model that a stage trains.

    Attributes:
        part: name of the part, one of `PARTS`.
        rank: rank of LoRA; 0 trains the part whole.
        alpha: LoRA is scaled by `alpha / rank`.
        dropout: dropout probability of LoRA's input.
        layers: indices of the decoder layers that get LoRA; None for all.

    Raises:
        ValueError: If a value is out of range, or the part does not support LoRA or `layers`.
    """

    part: str
    rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0
    layers: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.part not in PARTS:
            raise ValueError(f"{self.part!r} must be one of {', '.join(PARTS)}")
        if self.rank < 0:
            raise ValueError(f"lora ({self.rank}) must be at least 1")
        if self.rank and self.part not in LORA_PARTS:
            raise ValueError(
                f"lora is not supported for {self.part}; it is for {', '.join(LORA_PARTS)}"
            )
        if self.rank and not self.alpha > 0:
            raise ValueError(f"alpha ({self.alpha}) must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout ({self.dropout}) must be at least 0 and below 1")
        if self.layers is None:
            return
        if self.part not in LORA_LINEARS:
            raise ValueError(f"layers is for {' and '.join(LORA_LINEARS)}, not {self.part}")
        if not self.layers or len(set(self.layers)) < len(self.layers) or min(self.layers) < 0:
            raise ValueError(f"layers ({list(self.layers)}) must be different numbers from 0")

    def matches(self, name: str) -> bool:
        """Whether the parameter with this full name belongs to the part."""
        return re.fullmatch(self._of_layers(PARTS[self.part]), name) is not None

    @property
    def linears(self) -> str:
        """Linear modules that LoRA is attached to, as a regular expression for their full names."""
        return self._of_layers(LORA_LINEARS[self.part])

    def _of_layers(self, pattern: str) -> str:
        if self.layers is None:
            return pattern
        numbers = "|".join(map(str, self.layers))
        return pattern.replace(_LAYER, rf"model\.language_model\.layers\.({numbers})\.")


def trains_body(parts: tuple[TrainedPart, ...], kind: str) -> bool:
    """Whether a stage trains a connector's body, which is everything except for its projector."""
    kind = "image" if kind == "video" else kind
    name = f"model.{kind}_connector.query_tokens"
    return any(part.matches(name) for part in parts)
