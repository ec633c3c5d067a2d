"""The one table of shapes that benchmarks are run at.

T tokens, D model width, F expert width, E experts, K experts a token.
"""

from typing import NamedTuple

MODES = ("forward", "training")
ROUTINGS = ("natural", "zipf", "same")


class Layer(NamedTuple):
    """The sizes of one mixture-of-experts layer."""

    D: int
    F: int
    E: int
    K: int


class Case(NamedTuple):
    """One row of the results table."""

    layer: str
    tokens: int
    mode: str = "forward"
    routing: str = "natural"

    def __str__(self) -> str:
        return f"{self.layer}-T{self.tokens}-{self.mode}-{self.routing}"


# Published models first, then the same proportions at sizes that two CPU cores finish in seconds.
LAYERS = {
    "unimoe": Layer(D=4096, F=11008, E=4, K=2),
    "mixtral-8x7b": Layer(D=4096, F=14336, E=8, K=2),
    "qwen3-30b-a3b": Layer(D=2048, F=768, E=128, K=8),
    "olmoe": Layer(D=2048, F=1024, E=64, K=8),
    "small-unimoe": Layer(D=256, F=688, E=4, K=2),
    "small-mixtral": Layer(D=256, F=896, E=8, K=2),
    "small-qwen3": Layer(D=256, F=96, E=32, K=8),
}


def _cases(layers: tuple[str, ...], tokens: tuple[int, ...], skewed_tokens: int) -> list[Case]:
    cases = [Case(layer, T) for layer in layers for T in tokens]
    cases += [Case(layer, T, "training") for layer in layers for T in tokens if T >= 1024]
    skews = [routing for routing in ROUTINGS if routing != "natural"]
    cases += [Case(layers[0], skewed_tokens, mode, skew) for mode in MODES for skew in skews]
    return cases


SETS = {
    "smoke": [Case("small-qwen3", 16), Case("small-unimoe", 16, "training", "zipf")],
    "small": _cases(("small-unimoe", "small-mixtral", "small-qwen3"), (1, 128, 1024), 1024),
    "full": _cases(("unimoe", "mixtral-8x7b", "qwen3-30b-a3b", "olmoe"), (16, 1024, 4096), 4096),
}
