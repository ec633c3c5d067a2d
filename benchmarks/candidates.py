"""Candidates: a function to time, and a check that it must pass first."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn


class UnavailableError(Exception):
    """A provider cannot run here; the message is the reason."""


class Work(NamedTuple):
    """The minimum work of a case: floating-point operations, and bytes read and written."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Candidate:
    """One provider of one case.

    Attributes:
        run: the function to time. If it returns a number, this is its own time in seconds.
        check: raises AssertionError if the output is wrong; None if the output is not comparable,
            such as that of a dense layer.
        forward: forward pass with gradients, to measure what it saves for the backward; None if
            this cannot be measured or there is no backward.
        weights: tensors that are not counted as saved.
        in_process: whether memory can be measured in this process.
    """

    run: Callable[[], float | None]
    check: Callable[[], None] | None = None
    forward: Callable[[], object] | None = None
    weights: tuple[torch.Tensor, ...] = ()
    in_process: bool = True


Provider = Callable[[], Candidate]
"""Creates a candidate, or raises `UnavailableError` with the reason."""


def in_turns(candidates: Sequence[Candidate], turns: Iterator[int]) -> Candidate:
    """Returns a candidate whose calls cycle through several.

    Args:
        candidates: the same candidate on different memory.
        turns: counter of calls; shared by all providers that share memory.
    """
    if len(candidates) == 1:
        return candidates[0]
    return replace(candidates[0], run=lambda: candidates[next(turns) % len(candidates)].run())


def own_gradients(layer: nn.Module) -> nn.Module:
    """Returns a copy of a layer with new parameters that share the memory."""
    memo = {id(p): nn.Parameter(p.detach()) for p in layer.parameters()}
    return copy.deepcopy(layer, memo)
