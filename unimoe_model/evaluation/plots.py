"""The pictures of a report: loss curves, routing, accuracy and speed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from unimoe_kernels import atomic_write
from unimoe_model.extras import needed_by

with needed_by("drawing plots"):
    import matplotlib as mpl
    from matplotlib.figure import Figure

mpl.use("Agg")

SERIES_COLORS = {"moe": "#3b6fb6", "dense": "#c8743a", "blind": "#8f8f8f", "looped": "#7a9e5a"}


def save_loss_plot(path: Path, losses: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draws the loss of every stage, one panel a stage, one line an arm, four panels a row.

    Args:
        path: PNG that is written.
        losses: for each arm, stage name to the loss of each step.
    """
    stages = list(dict.fromkeys(stage for arm in losses.values() for stage in arm))
    columns = min(4, len(stages))
    rows = -(-len(stages) // columns)
    figure = Figure(figsize=(3.0 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(stages) :]:
        axis.set_visible(False)
    for axis, stage in zip(axes.flat, stages, strict=False):
        for arm, curves in losses.items():
            if stage in curves:
                values = _smoothed(curves[stage])
                axis.plot(values, color=SERIES_COLORS.get(arm), label=arm, linewidth=1.3)
        axis.set_title(stage, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7, frameon=False)
    for axis in axes[:, 0]:
        axis.set_ylabel("cross-entropy (nats a token)", fontsize=8)
    _save(figure, path)


def save_routing_plot(
    path: Path,
    shares: Mapping[str, torch.Tensor],
    experts: Sequence[str],
    layers: Sequence[int] | None = None,
    *,
    top_k: int = 1,
    tokens: Mapping[str, int] | None = None,
) -> None:
    """Draws which expert takes which modality's tokens, layer by layer, two panels a row.

    Args:
        path: PNG that is written.
        shares: for each modality, `[layers, E]`, rows summing to one (`routing_shares`).
        experts: name of each expert.
        layers: number of each row's decoder layer; 0, 1, 2, ... if None.
        top_k: experts a token is routed to, each to different ones: no expert can take more than
            the share `1 / top_k`, which is the darkest colour.
        tokens: number of each modality's tokens, for the titles.
    """
    height = len(next(iter(shares.values())))
    layers = range(height) if layers is None else layers
    columns = min(2, len(shares))
    rows = -(-len(shares) // columns)
    size = (2.4 * columns + 0.6, rows * max(1.6, 0.26 * height + 0.9))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    most = 1 / top_k
    for axis in axes.flat[len(shares) :]:
        axis.set_visible(False)
    for axis, (modality, share) in zip(axes.flat, shares.items(), strict=False):
        image = axis.imshow(share.numpy(), vmin=0, vmax=most, cmap="Blues", aspect="auto")
        for layer, row in enumerate(share.tolist()):
            for expert, value in enumerate(row):
                shade = "white" if value > 0.6 * most else "#333333"
                text = f"{100 * value:.0f}"
                axis.text(expert, layer, text, ha="center", va="center", size=9, c=shade)
        count = "" if tokens is None else f", {tokens[modality]:,} tokens"
        axis.set_title(f"{modality}{count}", fontsize=10)
        axis.set_xticks(range(len(experts)), experts, fontsize=9, rotation=30)
        axis.set_yticks(range(height), [str(layer) for layer in layers], fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("layer", fontsize=9)
    colorbar = figure.colorbar(image, ax=list(axes.flat), shrink=0.7)
    colorbar.set_label(f"share of routed rows, at most {100 * most:.0f} %", fontsize=9)
    colorbar.set_ticks([0, most / 2, most], labels=[f"{50 * i * most:.0f} %" for i in range(3)])
    _save(figure, path)


def save_accuracy_plot(path: Path, accuracy: Mapping[str, Mapping[str, float]]) -> None:
    """Draws held-out accuracy by task as grouped bars.

    Args:
        path: PNG that is written.
        accuracy: for each of `moe`, `dense` and `blind`, task to accuracy in 0..1.
    """
    tasks = list(next(iter(accuracy.values())))
    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(accuracy)
    for i, (name, by_task) in enumerate(accuracy.items()):
        positions = np.arange(len(tasks)) + (i - (len(accuracy) - 1) / 2) * width
        bars = axis.bar(
            positions,
            [100 * by_task[task] for task in tasks],
            width * 0.94,
            label=name,
            color=SERIES_COLORS.get(name),
        )
        axis.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    axis.set_xticks(range(len(tasks)), [task.replace("_", " ") for task in tasks], fontsize=9)
    axis.set_ylabel("held-out accuracy, %")
    axis.set_ylim(0, 109)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    axis.legend(fontsize=8, frameon=False, ncols=3, loc="upper right", bbox_to_anchor=(1, 1.13))
    _save(figure, path)


def _smoothed(values: Sequence[float], window: int = 15) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    window = min(window, len(values))
    if window < 2:
        return values
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=130)
