"""Measures: numbers computed from the runs of a seed."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from unimoe_model.evaluation.specialisation import expert_entropy, mutual_information
from unimoe_model.study.record import Record
from unimoe_model.value_types import fits_type

Runs = Mapping[str, Record]
"""The runs of a seed, by arm."""


def steps_to_loss(runs: Runs, arm: str, loss: float, window: int = 20) -> float:
    """First step at which the mean loss of the last `window` steps is at most `loss`.

    If there is none, the number of steps plus one.
    """
    means = _trailing_means(runs[arm].losses, window)
    reached = np.flatnonzero(means <= loss)
    return float(reached[0] + window if len(reached) else len(runs[arm].losses) + 1)


def final_loss(runs: Runs, arm: str, window: int = 20) -> float:
    """Mean loss of the last `window` steps, nats per token."""
    return float(np.mean(runs[arm].losses[-window:]))


def loss_spread(runs: Runs, arm: str, window: int = 20, last: int | None = None) -> float:
    """Standard deviation of the loss within windows of `window` steps, nats per token.

    The root mean square of the residuals of a straight line fitted to each window, so that the
    decrease of the loss does not count as spread; each window has `window - 2` degrees of freedom.

    Args:
        runs: runs of a seed.
        arm: the arm to measure.
        window: number of steps of a window, at least 3.
        last: use only the last steps; None for all.
    """
    losses = np.asarray(runs[arm].losses, dtype=np.float64)[-(last or 0) :]
    if len(losses) < window:
        raise ValueError(f"window ({window}) must be at most the number of steps ({len(losses)})")
    windows = np.lib.stride_tricks.sliding_window_view(losses, window)
    steps = np.arange(window) - (window - 1) / 2
    slopes = windows @ steps / (steps @ steps)
    rest = windows - windows.mean(1, keepdims=True) - slopes[:, None] * steps
    return float(np.sqrt(np.square(rest).sum() / (len(windows) * (window - 2))))


def accuracy(runs: Runs, arm: str, tasks: list[str] | None = None) -> float:
    """Unweighted mean score of the evaluations, 0 to 1."""
    scores = runs[arm].accuracy
    return float(np.mean([scores[task] for task in (tasks or scores)]))


def accuracy_drop(runs: Runs, arm: str, alone: dict[str, str]) -> float:
    """Mean over tasks of the score of an arm trained on that task alone, minus the arm's score.

    Args:
        runs: runs of a seed.
        arm: the arm to measure.
        alone: for each evaluation, the arm trained on its task alone.
    """
    drops = [runs[own].accuracy[task] - runs[arm].accuracy[task] for task, own in alone.items()]
    return float(np.mean(drops))


def routing_information(runs: Runs, arm: str) -> float:
    """Mutual information of modality and expert, mean over layers, bits (`mutual_information`)."""
    return float(mutual_information(_taken(runs, arm)).mean())


def routing_entropy(runs: Runs, arm: str) -> float:
    """Entropy of the expert of a routed row, mean over layers, bits (`expert_entropy`)."""
    return float(expert_entropy(_taken(runs, arm)).mean())


@dataclass(frozen=True)
class Kind:
    """A kind of measure.

    Attributes:
        compute: function of the runs of a seed, the arm and the options.
        title: name in tables.
        scale: factor of the displayed value.
        digits: decimals of the displayed value.
        options: types of the options.
        required: options without a default.
    """

    compute: Callable[..., float]
    title: str
    scale: float = 1.0
    digits: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()


KINDS = {
    "steps_to_loss": Kind(
        steps_to_loss,
        "steps to the loss",
        digits=1,
        options={"loss": float, "window": int},
        required=("loss",),
    ),
    "final_loss": Kind(final_loss, "final loss", options={"window": int}),
    "loss_spread": Kind(loss_spread, "spread of the loss", options={"window": int, "last": int}),
    "accuracy": Kind(accuracy, "accuracy, %", 100, 1, {"tasks": list[str]}),
    "accuracy_drop": Kind(
        accuracy_drop, "drop in accuracy, points", 100, 1, {"alone": dict[str, str]}, ("alone",)
    ),
    "routing_information": Kind(routing_information, "mutual information, bits"),
    "routing_entropy": Kind(routing_entropy, "entropy of the experts, bits"),
}


def check_measure(kind: Any, options: Mapping[str, Any], arms: Collection[str], where: str) -> None:
    """Raises ValueError, naming the key, if the measure is unknown or an option is invalid."""
    if kind not in KINDS:
        raise ValueError(f"{where}.kind ({kind!r}) must be one of {', '.join(KINDS)}")
    own = KINDS[kind]
    for name, value in options.items():
        if name not in own.options:
            known = ", ".join(own.options) or "none"
            raise ValueError(f"{where}.{name} is an unknown option of {kind}; there are {known}")
        if not fits_type(value, own.options[name]):
            raise ValueError(f"{where}.{name} ({value!r}) must be of type {own.options[name]}")
    for name in own.required:
        if name not in options:
            raise ValueError(f"{where}.{name} is missing")
    least = {"window": 3 if kind == "loss_spread" else 1, "last": 3}
    for name, value in options.items():
        if name in least and value < least[name]:
            raise ValueError(f"{where}.{name} ({value}) must be at least {least[name]}")
    for name in options.get("alone", {}).values():
        if name not in arms:
            raise ValueError(f"{where}.alone ({name}) must be among the arms: {', '.join(arms)}")


def arms_of(options: Mapping[str, Any]) -> list[str]:
    """Arms that a measure with these options reads besides the measured one."""
    return list(options.get("alone", {}).values())


def _taken(runs: Runs, arm: str) -> dict[str, torch.Tensor]:
    routing = runs[arm].routing
    if routing is None:
        raise ValueError(f"arm {arm} has no routing: its model is dense")
    return {modality: torch.tensor(rows) for modality, rows in routing.taken.items()}


def _trailing_means(losses: list[float], window: int) -> np.ndarray:
    """Means of all windows of consecutive steps."""
    if len(losses) < window:
        raise ValueError(f"window ({window}) must be at most the number of steps ({len(losses)})")
    return np.convolve(losses, np.full(window, 1 / window), mode="valid")
