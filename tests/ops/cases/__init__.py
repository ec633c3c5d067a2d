"""Which operators there are, and examples of each, by which tests run all of them.

An operator is a folder of `unimoe_kernels/ops` with an `op.py`. Its examples are the module of its
name here; `test_cases.py` fails without it, and where it leaves a kernel out. It has

- `CASES`, a list of `Case`: calls for the tests of derivatives, of `torch.compile` and of threads.
  The first one also runs in Triton's interpreter.
- `launches(everything)`, of an operator with Triton kernels: yields (name, function that launches
  kernels), a few, or everything that is compiled ahead of time.
- `launch(shape)`, likewise: launches those whose compilation no number of tokens may change.

Triton and kernels are imported inside functions.
"""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

OPS_FOLDER = Path(importlib.util.find_spec("unimoe_kernels").origin).parent / "ops"


class Sizes(NamedTuple):
    """Tokens, model width, expert width, experts, experts a token, rank."""

    T: int
    D: int
    F: int
    E: int
    K: int
    R: int

    @property
    def N(self):  # noqa: N802
        return self.T * self.K


class Case(NamedTuple):
    """A call of an operator: `function(ids, num_experts, *inputs)`.

    The inputs are those that can be differentiated. `shapes(sizes)` lists their shapes, for ids
    `[T, K]` of which `num_experts` and more belong to another rank.
    """

    name: str
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    shapes: Callable[[Sizes], tuple[tuple[int, ...], ...]]


class Shape(NamedTuple):
    """A layer for which kernels are launched."""

    name: str
    tokens: int
    width: int
    expert_width: int
    experts: int
    top_k: int
    dtype: torch.dtype

    @property
    def rows(self):
        return self.tokens * self.top_k

    @property
    def score_dtype(self):
        return torch.float64 if self.dtype == torch.float64 else torch.float32


SHAPES = [
    Shape("mixtral", 4096, 4096, 14336, 8, 2, torch.bfloat16),
    Shape("qwen3-decode", 16, 2048, 768, 128, 8, torch.bfloat16),
    # No width divides a tile.
    Shape("odd", 500, 200, 300, 4, 2, torch.float16),
    Shape("fp32", 4096, 1024, 2816, 4, 2, torch.float32),
    Shape("qwen3", 4096, 2048, 768, 128, 8, torch.bfloat16),
    Shape("fp64", 64, 256, 512, 4, 2, torch.float64),
]
FP32 = SHAPES[3]


def operators():
    """Names of the operators: the folders that declare one."""
    return sorted(path.parent.name for path in OPS_FOLDER.glob("*/op.py"))


def of(op):
    """The examples of an operator, or None where it has no module here."""
    if importlib.util.find_spec(f"{__name__}.{op}") is None:
        return None
    return importlib.import_module(f"{__name__}.{op}")


def cases(op):
    """The calls of an operator: none where it has no module here, for which `test_cases` fails."""
    return getattr(of(op), "CASES", [])


def with_launches():
    """The examples of operators that launch kernels."""
    return [module for module in map(of, operators()) if hasattr(module, "launches")]


def all_launches(everything):
    """Yields (name, function that launches kernels) of all operators."""
    for module in with_launches():
        yield from module.launches(everything)


def at_every_shape(launch, everything):
    """Yields the launches of a function of a shape: at the first shape, or at all of them."""
    for shape in SHAPES if everything else SHAPES[:1]:
        yield shape.name, lambda shape=shape: launch(shape)


def empty(*size, dtype):
    """A tensor without data."""
    size = size[0] if size == ((),) else size
    return torch.empty(size, dtype=dtype, device="meta")


def ints(size):
    return empty(size, dtype=torch.int32)


def scores_of(values):
    """Scores for rows of any dtype: float64 or float32, as those of a router."""
    return values if values.dtype == torch.float64 else values.float()


def with_tf32(launch):
    """A function that launches with TF32 allowed for float32."""

    def run():
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            launch()
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    return run
