"""What is measured: a function to time, and the check that it must pass before."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn


class UnavailableError(Exception):
    """Why a provider does not run here."""


class Work(NamedTuple):
    """The least that a case needs: floating point operations, and bytes read and written."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Candidate:
    """One provider of one case.

    Attributes:
        run: what is timed. If it returns a number, it has timed itself, in seconds.
        check: raises AssertionError where the answer is wrong; None where nothing else can be
            compared with it, such as a dense layer.
        forward: forward pass with gradients on, to count what it keeps; None where it cannot be
            seen or there is no backward.
        weights: tensors that are not counted as kept.
        in_process: whether memory can be seen from here.
    """

    run: Callable[[], float | None]
    check: Callable[[], None] | None = None
    forward: Callable[[], object] | None = None
    weights: tuple[torch.Tensor, ...] = ()
    in_process: bool = True


Provider = Callable[[], Candidate]
"""Makes a candidate, or raises `UnavailableError` with the reason."""


def in_turns(candidates: Sequence[Candidate], turns: Iterator[int]) -> Candidate:
    """The first candidate, whose calls run one of them after the other.

    Args:
        candidates: the same on other memory.
        turns: counts calls; where providers share memory, one for all of them.
    """
    if len(candidates) == 1:
        return candidates[0]
    return replace(candidates[0], run=lambda: candidates[next(turns) % len(candidates)].run())


def own_gradients(layer: nn.Module) -> nn.Module:
    """A copy of a layer with parameters of its own on the same memory."""
    memo = {id(p): nn.Parameter(p.detach()) for p in layer.parameters()}
    return copy.deepcopy(layer, memo)
