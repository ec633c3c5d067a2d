"""Plot of routed tokens by expert, layer and modality."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from unimoe_kernels import atomic_write
from unimoe_model.extras import needed_by

with needed_by("drawing plots", "eval"):
    import matplotlib as mpl
    from matplotlib.figure import Figure

mpl.use("Agg")


def save_routing_plot(
    path: Path,
    shares: Mapping[str, torch.Tensor],
    experts: Sequence[str],
    layers: Sequence[int] | None = None,
    *,
    top_k: int = 1,
    tokens: Mapping[str, int] | None = None,
) -> None:
    """Draws a heat map per modality: the share of routed rows by layer and expert.

    Args:
        path: PNG file to write.
        shares: for each modality, `[layers, E]`, rows summing to one (`RoutingCounts.shares`).
        experts: name of each expert.
        layers: index of each row's decoder layer; None for 0, 1, 2, ...
        top_k: experts per token. The K experts of a token are distinct, so no share exceeds
            `1 / top_k`, which is drawn in the darkest colour.
        tokens: number of tokens of each modality, for the titles.
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
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=130)
