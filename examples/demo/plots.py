"""Plots of the demo: loss curves and accuracy."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from unimoe_kernels import atomic_write
from unimoe_model.extras import needed_by

with needed_by("drawing plots", "eval"):
    import matplotlib as mpl
    from matplotlib.figure import Figure

mpl.use("Agg")

ARM_NAMES = {
    "moe": "MoE",
    "dynamic": "dynamic MoE",
    "dense": "dense",
    "blind": "blind",
    "base": "both",
}
_COLORS = {
    "moe": "#3b6fb6",
    "dynamic": "#5b9f5b",
    "dense": "#c8743a",
    "blind": "#8f8f8f",
    "base": "#555555",
}


def save_loss_plot(path: Path, losses: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draws the loss of every stage, one panel per stage and one line per arm.

    Args:
        path: PNG file to write.
        losses: loss of each step, by arm and stage.
    """
    stages = list(dict.fromkeys(stage for arm in losses.values() for stage in arm))
    columns = min(2, len(stages))
    rows = -(-len(stages) // columns)
    figure = Figure(figsize=(2.5 * columns, 1.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(stages) :]:
        axis.set_visible(False)
    for axis, stage in zip(axes.flat, stages, strict=False):
        for arm, curves in losses.items():
            if stage in curves:
                values = _smoothed(curves[stage])
                axis.plot(values, color=_COLORS[arm], label=ARM_NAMES[arm], linewidth=1.5)
        axis.set_title(stage, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=9)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=9, frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=9)
    figure.supylabel("cross-entropy, nats a token", fontsize=9)
    _save(figure, path)


def save_accuracy_plot(path: Path, accuracy: Mapping[str, Mapping[str, float]]) -> None:
    """Draws held-out accuracy by task as grouped bars.

    Args:
        path: PNG file to write.
        accuracy: accuracy in 0..1, by `moe`, `dense` and `blind`, and by task.
    """
    tasks = list(next(iter(accuracy.values())))
    figure = Figure(figsize=(5, 0.62 * len(tasks) + 0.8), layout="constrained")
    axis = figure.subplots()
    height = 0.84 / len(accuracy)
    for i, (arm, by_task) in enumerate(accuracy.items()):
        places = np.arange(len(tasks)) + (i - (len(accuracy) - 1) / 2) * height
        values = [100 * by_task[task] for task in tasks]
        bars = axis.barh(places, values, height * 0.92, label=ARM_NAMES[arm], color=_COLORS[arm])
        axis.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    axis.set_yticks(range(len(tasks)), [task.replace(" about ", "\nabout ") for task in tasks])
    axis.tick_params(labelsize=9)
    axis.set_xlabel("held-out accuracy, %", fontsize=9)
    axis.set_xlim(0, 112)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    figure.legend(fontsize=9, frameon=False, ncols=3, loc="outside upper center")
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
