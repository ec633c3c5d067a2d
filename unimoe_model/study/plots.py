"""Plots of a study: loss curves with bands over seeds, and routing maps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from unimoe_kernels import atomic_write
from unimoe_model.evaluation.plots import save_routing_plot
from unimoe_model.extras import needed_by
from unimoe_model.study.record import Record

with needed_by("drawing plots", "eval"):
    import matplotlib as mpl
    from matplotlib.figure import Figure

mpl.use("Agg")
_COLORS = ("#3b6fb6", "#c8743a", "#4f9a6b", "#8a5aa8", "#b04a5a", "#7a7a7a", "#b59a2c", "#2c8f9a")


def save_loss_curves(
    path: Path, curves: Mapping[str, Sequence[Sequence[float]]], window: int = 15
) -> None:
    """Plots the mean loss of each arm, with a band of one standard deviation over seeds.

    Args:
        path: PNG file to write.
        curves: losses of the runs of each arm.
        window: number of steps of the moving average.
    """
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axis = figure.subplots()
    for color, (arm, runs) in zip(_cycle(len(curves)), curves.items(), strict=True):
        smooth_RS = np.stack([_smoothed(losses, window) for losses in runs])
        steps = np.arange(smooth_RS.shape[1]) + min(window, len(runs[0]))
        mean_S, spread_S = smooth_RS.mean(0), smooth_RS.std(0)
        axis.plot(steps, mean_S, color=color, linewidth=1.6, label=arm)
        axis.fill_between(steps, mean_S - spread_S, mean_S + spread_S, color=color, alpha=0.15)
    axis.set_xlabel("step", fontsize=9)
    axis.set_ylabel("cross-entropy, nats per token", fontsize=9)
    axis.tick_params(labelsize=9)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9, frameon=False)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=130, format="png")


def save_routing_map(path: Path, records: Sequence[Record]) -> None:
    """Plots the share of each modality's routed rows per expert and layer, over all seeds.

    Args:
        path: PNG file to write.
        records: runs of an arm with MoE layers.
    """
    first = records[0].routing
    taken = {
        modality: sum(torch.tensor(record.routing.taken[modality]) for record in records).double()
        for modality in first.taken
    }
    shares = {kind: rows / rows.sum(1, keepdim=True).clamp(min=1) for kind, rows in taken.items()}
    names = first.experts
    if len(set(names)) < len(names):
        names = [f"{name} {number}" for number, name in enumerate(names)]
    save_routing_plot(path, shares, names, first.layers, top_k=first.top_k)


def _cycle(count: int) -> list[str]:
    return [_COLORS[number % len(_COLORS)] for number in range(count)]


def _smoothed(losses: Sequence[float], window: int) -> np.ndarray:
    window = min(window, len(losses))
    return np.convolve(losses, np.full(window, 1 / window), mode="valid")
