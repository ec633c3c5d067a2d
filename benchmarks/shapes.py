"""The table of benchmark shapes.

T tokens, D model width, F expert width, E experts, K experts per token.
"""

from typing import NamedTuple

MODES = ("forward", "training")
ROUTINGS = ("natural", "uniform", "zipf", "same")
TOKENS = (1, 16, 128, 1024, 4096, 32768)
COLD_TOKENS = 128
"""Up to this many tokens, a layer's weights are cold, and reading them dominates."""

COPIED_ROWS = 65536
"""Rows of small copying cases: at this size they exceed every cache, and times vary least."""


class Layer(NamedTuple):
    """The sizes of one mixture-of-experts layer."""

    D: int
    F: int
    E: int
    K: int

    @property
    def group_size(self) -> int:
        """Numbers that share a scale where it is quantised: 64, or 32 if a width requires it."""
        return 32 if self.D % 64 or self.F % 64 else 64


class Case(NamedTuple):
    """One row of the results table.

    Attributes:
        layer: name in `LAYERS`.
        tokens: T.
        mode: `"forward"`, or `"training"`, which is forward and backward.
        routing: kind of routing; see `Problem`.
        dtype: dtype such as `"bfloat16"`, or "" for the default of the device.
    """

    layer: str
    tokens: int
    mode: str = "forward"
    routing: str = "natural"
    dtype: str = ""

    def __str__(self) -> str:
        parts = (self.layer, f"T{self.tokens}", self.mode, self.routing, self.dtype)
        return "-".join(part for part in parts if part)


class ShapeSet(NamedTuple):
    """What one run measures.

    Attributes:
        layer: cases of the whole layer.
        operator: cases of operators that compute.
        movement: cases of operators that select, sort and copy, with more tokens.
        lora: cases of LoRA on the experts of a layer.
        quantized: cases of a layer with quantised experts.
        ranks: cases of a layer with its experts in several processes.
        host: cases of layers so small that host time dominates.
        launch: cases of the launches of a layer's Triton kernels.
        model: name in `MODEL_CASES`, or "" for none.
        threads: number of threads of the process, or 0 for all.
    """

    layer: tuple[Case, ...]
    operator: tuple[Case, ...] = ()
    movement: tuple[Case, ...] = ()
    lora: tuple[Case, ...] = ()
    quantized: tuple[Case, ...] = ()
    ranks: tuple[Case, ...] = ()
    host: tuple[Case, ...] = ()
    launch: tuple[Case, ...] = ()
    model: str = ""
    threads: int = 0


# Published models first, then the same proportions at sizes that two CPU cores finish in seconds.
LAYERS = {
    "unimoe": Layer(D=4096, F=11008, E=4, K=2),
    "mixtral-8x7b": Layer(D=4096, F=14336, E=8, K=2),
    "qwen3-30b-a3b": Layer(D=2048, F=768, E=128, K=8),
    "olmoe": Layer(D=2048, F=1024, E=64, K=8),
    "sonicmoe-7b-fine": Layer(D=1536, F=256, E=128, K=8),
    "sonicmoe-7b-coarse": Layer(D=1536, F=1024, E=32, K=2),
    "deepseek-v3": Layer(D=7168, F=2048, E=256, K=8),
    "medium-unimoe": Layer(D=1024, F=2816, E=4, K=2),
    "medium-mixtral": Layer(D=1024, F=2816, E=8, K=2),
    "medium-qwen3": Layer(D=2048, F=768, E=32, K=8),
    "large-qwen3": Layer(D=2048, F=768, E=64, K=8),
    "small-unimoe": Layer(D=512, F=1376, E=4, K=2),
    "small-mixtral": Layer(D=512, F=1792, E=8, K=2),
    "small-qwen3": Layer(D=512, F=192, E=32, K=8),
    # Measures the time of a call in Python and C++, not of the matmuls.
    "host": Layer(D=64, F=64, E=8, K=2),
    # Not timed: small enough for Triton's interpreter to compute in a second.
    "tiny-fine": Layer(D=64, F=32, E=8, K=2),
    "tiny-coarse": Layer(D=48, F=80, E=4, K=2),
}

SMALL = ("small-unimoe", "small-mixtral", "small-qwen3")
PUBLISHED = (
    "unimoe",
    "mixtral-8x7b",
    "qwen3-30b-a3b",
    "olmoe",
    "sonicmoe-7b-fine",
    "sonicmoe-7b-coarse",
    "deepseek-v3",
)


def _small() -> ShapeSet:
    first, skews = SMALL[0], [routing for routing in ROUTINGS if routing != "natural"]
    operators = (SMALL[0], SMALL[2])
    return ShapeSet(
        layer=(
            *(Case(layer, T) for layer in SMALL for T in (1, 16, 128, 1024)),
            *(Case(layer, 1024, "training") for layer in SMALL),
            *(Case(first, 1024, mode, skew) for mode in MODES for skew in skews),
        ),
        operator=tuple(Case(layer, 1024, mode) for layer in operators for mode in MODES),
        movement=tuple(
            Case(layer, COPIED_ROWS // LAYERS[layer].K, mode)
            for layer in operators
            for mode in MODES
        ),
        lora=(Case("medium-mixtral", 1024, "training"),),
        model="small",
    )


def _cpu_goals() -> ShapeSet:
    """Rows of the goals for CPUs, in both dtypes."""
    cases = (
        Case("medium-unimoe", 2048),
        Case("medium-qwen3", 1024),
        Case("olmoe", 512),
        Case("medium-mixtral", 1),
        Case("large-qwen3", 4),
        Case("medium-unimoe", 2048, "training"),
        Case("medium-qwen3", 1024, "training"),
        *(Case("medium-unimoe", 2048, "forward", skew) for skew in ("uniform", "zipf", "same")),
    )
    dtypes = ("float32", "bfloat16")
    return ShapeSet(layer=tuple(case._replace(dtype=dtype) for case in cases for dtype in dtypes))


def _goals() -> ShapeSet:
    """Rows of the goals for GPUs, which one GPU completes in minutes."""
    operators = ("unimoe", "qwen3-30b-a3b")
    return ShapeSet(
        layer=(
            *(Case("unimoe", T) for T in (16, 4096, 32768)),
            Case("unimoe", 4096, "training"),
            *(Case("mixtral-8x7b", 4096, mode) for mode in MODES),
            *(Case("qwen3-30b-a3b", T) for T in (16, 128, 4096, 32768)),
            *(Case("qwen3-30b-a3b", T, "training") for T in (4096, 32768)),
            Case("qwen3-30b-a3b", 4096, "forward", "zipf"),
            Case("qwen3-30b-a3b", 4096, "forward", "same"),
            *(Case("olmoe", 4096, mode) for mode in MODES),
        ),
        operator=tuple(Case(layer, 4096, mode) for layer in operators for mode in MODES),
        movement=tuple(Case(layer, 32768, mode) for layer in operators for mode in MODES),
        lora=(Case("medium-mixtral", 4096, "training"),),
        model="large",
    )


def _full() -> ShapeSet:
    every = [
        Case(layer, T, mode, routing)
        for layer in PUBLISHED
        for T in TOKENS
        for mode in MODES
        for routing in ROUTINGS
    ]
    # Training with a few tokens is not a realistic load, and one token has no skew.
    wanted = [case for case in every if case.tokens >= 1024 or case.mode == "forward"]
    wanted = [case for case in wanted if case.tokens > 1 or case.routing == "natural"]
    # References of operators hold all weights in higher precision, too large for the last shape.
    natural = (case for case in wanted if case.routing == "natural")
    operator = tuple(case for case in natural if case.layer != "deepseek-v3")
    return ShapeSet(layer=tuple(wanted), operator=operator, movement=operator, model="large")


HOST = tuple(Case("host", 4, mode) for mode in MODES)
LAUNCH = (Case("small-qwen3", 16), Case("small-qwen3", 1024, "training"))

SETS = {
    "smoke": ShapeSet(
        layer=(
            Case("tiny-fine", 16, dtype="bfloat16"),
            Case("tiny-coarse", 16, "training", "zipf"),
        ),
        operator=(Case("tiny-fine", 16), Case("tiny-fine", 16, "training")),
        movement=(Case("tiny-fine", 16), Case("tiny-fine", 16, "training")),
        lora=(Case("tiny-fine", 16, "training"),),
        quantized=(Case("tiny-fine", 16),),
        ranks=(Case("tiny-fine", 18, "training"),),
        host=HOST,
        model="smoke",
    ),
    "small": _small(),
    "cpu-goals": _cpu_goals(),
    "host": ShapeSet(layer=(), host=HOST, launch=LAUNCH, threads=1),
    "quantized": ShapeSet(
        layer=(),
        lora=(Case("medium-mixtral", 1024, "training", dtype="bfloat16"),),
        quantized=tuple(
            Case(layer, T, dtype="bfloat16")
            for layer, few in (("large-qwen3", 4), ("medium-mixtral", 1))
            for T in (few, 1024)
        ),
    ),
    "goals": _goals(),
    "full": _full(),
    # Of processes that share the experts of a layer: one machine's, so gloo moves the rows.
    "ranks": ShapeSet(
        layer=(),
        ranks=(
            *(
                Case("small-unimoe", 2048, mode, routing)
                for mode in MODES
                for routing in ("natural", "same")
            ),
            Case("small-qwen3", 2048, "training"),
        ),
    ),
}


class Model(NamedTuple):
    """Sizes of a Uni-MoE and its inputs.

    Attributes:
        D: model width.
        F: expert width.
        layers: decoder layers, each with 4 experts, 2 per token.
        vocabulary: V.
        batch: rows.
        prompt: tokens per row, including those of one picture.
    """

    D: int
    F: int
    layers: int
    vocabulary: int
    batch: int
    prompt: int


MODELS = {
    "smoke": Model(D=32, F=48, layers=2, vocabulary=64, batch=2, prompt=16),
    "small": Model(D=256, F=688, layers=4, vocabulary=4096, batch=4, prompt=128),
    "large": Model(D=2048, F=5504, layers=8, vocabulary=32000, batch=8, prompt=512),
}
NEW_TOKENS = 16
MODEL_CASES = {
    name: tuple(
        Case(name, model.batch * model.prompt, mode)
        for mode in ("training", "first-token", f"generate-{NEW_TOKENS}")
    )
    for name, model in MODELS.items()
} | {"": ()}


def every_case(name: str) -> tuple[Case, ...]:
    """All cases of a set."""
    chosen = SETS[name]
    cases = (
        *chosen.layer,
        *chosen.operator,
        *chosen.movement,
        *chosen.lora,
        *chosen.quantized,
        *chosen.ranks,
        *chosen.host,
        *chosen.launch,
        *MODEL_CASES[chosen.model],
    )
    return tuple(dict.fromkeys(cases))
