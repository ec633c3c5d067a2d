"""The matmuls of a mixture-of-experts layer, as problems of the tile choice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from unimoe_kernels._triton.problem import MAX_ROWS, Problem
from unimoe_kernels._triton.tiles import rows_bucket

PASSES = ("forward", "backward")
MIN_BACKWARD_TOKENS = 1024  # training uses at least this many


class Shape(NamedTuple):
    """The sizes of a layer."""

    width: int  # D
    expert_width: int  # F
    experts: int  # E
    top_k: int  # K


class Case(NamedTuple):
    """One matmul of a layer at a number of tokens.

    Attributes:
        name: `"gate_up"` and `"down"` forward; backward `"gated_backward"`, `"grad_down"`,
            `"grad_gate_up"` (gradients of weights) and `"grad_x"`.
        shape: Shape of the layer.
        tokens: Number of tokens T.
        problem: Problem of the tile choice.
    """

    name: str
    shape: Shape
    tokens: int
    problem: Problem

    def __str__(self) -> str:
        d, f, e, k = self.shape
        return f"{self.name} D={d} F={f} E={e} K={k} T={self.tokens}"


def cases_of(
    shapes: Iterable[Shape],
    tokens: Iterable[int],
    dtype: torch.dtype,
    passes: Iterable[str] = PASSES,
) -> list[Case]:
    """Returns the matmuls to measure, each problem once and the most important first.

    All forward matmuls come before those of the backward, and token counts and shapes in the given
    order, so that a limited time is spent on those named first.
    """
    found: dict[Problem, Case] = {}
    tokens, shapes = list(tokens), list(shapes)
    for one_pass in passes:
        for count in tokens:
            for shape in shapes:
                # Beyond the largest bucket, more rows per expert are the same problem.
                most = max(1, MAX_ROWS * shape.experts // shape.top_k)
                for case in _matmuls(one_pass, shape, min(count, most), dtype):
                    found.setdefault(case.problem, case)
    return list(found.values())


def _matmuls(one_pass: str, shape: Shape, tokens: int, dtype: torch.dtype) -> list[Case]:
    d, f, experts, top_k = shape
    rows = rows_bucket(tokens * top_k, experts)

    def case(name: str, kind: str, inner: int, width: int, height: int, k: int) -> Case:
        problem = Problem(kind, inner, width, height, experts, k, dtype, rows)
        return Case(name, shape, tokens, problem)

    if one_pass == "forward":
        return [
            case("gate_up", "gated", d, f, 0, top_k),
            case("down", "rows", f, d, 0, 1),
        ]
    if tokens < MIN_BACKWARD_TOKENS:
        return []
    return [
        case("gated_backward", "gated_backward", d, f, 0, top_k),
        case("grad_down", "weights", 0, f, d, 1),
        case("grad_gate_up", "weights", 0, d, 2 * f, 1),
        case("grad_x", "rows", 2 * f, d, 0, 1),
    ]
