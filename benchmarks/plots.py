"""Plots of a results file: bars for peers, and time against token count."""

import json
import re
from collections import defaultdict
from pathlib import Path

from unimoe_kernels import atomic_write

from .history import Row

COLORS = {
    "ours": "#d62728",
    "ours-cuda": "#d62728",
    "ours-triton": "#ff9896",
    "ours-packed": "#ff9896",
    "dense": "#7f7f7f",
    "looped": "#1f77b4",
    "transformers-eager": "#aec7e8",
    "transformers-grouped_mm": "#ff7f0e",
    "transformers-batched_mm": "#2ca02c",
    "zentorch": "#9467bd",
    "liger": "#8c564b",
}


def draw(path: Path) -> list[Path]:
    """Draws `<class>-<shapes>-peers.svg` and `-tokens.svg` beside a results file.

    Nothing is drawn if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("svg")
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in result["rows"] if row["key"].startswith("moe_layer[")]
    if not rows:
        return []
    stem = re.sub(r"-\d{4}-\d\d-\d\d$", "", path.stem)
    return [
        _bars(rows, result, path.with_name(f"{stem}-peers.svg")),
        _lines(rows, result, path.with_name(f"{stem}-tokens.svg")),
    ]


def _bars(rows: list[Row], result: dict, path: Path) -> Path:
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for row in rows for name in row["providers"]))
    figure, axes = plt.subplots(figsize=(10, 0.16 * len(rows) * len(names) + 1.5))
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        held = [
            (i, row["providers"][name]) for i, row in enumerate(rows) if name in row["providers"]
        ]
        axes.barh(
            [i + index * height for i, _ in held],
            [1 / figures["ratio"] for _, figures in held],
            height,
            label=name,
            color=COLORS.get(name),
        )
    axes.set_yticks([i + 0.4 for i in range(len(rows))])
    axes.set_yticklabels([row["key"][len("moe_layer[") : -1] for row in rows], fontsize=7)
    axes.set_ylim(len(rows), -0.3)
    axes.axvline(1, color="black", linewidth=0.6)
    axes.set_xlabel("speed, by a dense layer of the same active multiplications (longer is faster)")
    axes.legend(fontsize=7)
    _title(axes, result)
    return _save(figure, path)


def _lines(rows: list[Row], result: dict, path: Path) -> Path:
    from matplotlib import pyplot as plt

    held: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["case"]["mode"] == "forward" and row["case"]["routing"] == "natural":
            held[f"{row['case']['layer']}, {row['dtype']}"].append(row)
    by_layer = {name: own for name, own in held.items() if len(own) > 1} or held
    figure, all_axes = plt.subplots(
        1, max(1, len(by_layer)), figsize=(4.2 * max(1, len(by_layer)), 3.8), squeeze=False
    )
    for axes, (layer, own) in zip(all_axes[0], by_layer.items(), strict=False):
        own.sort(key=lambda row: row["case"]["tokens"])
        for name in dict.fromkeys(name for row in own for name in row["providers"]):
            points = [
                (row["case"]["tokens"], row["providers"][name]["median_ms"])
                for row in own
                if name in row["providers"]
            ]
            axes.plot(*zip(*points, strict=True), marker="o", label=name, color=COLORS.get(name))
        shares = [row["providers"]["ours"] for row in own]
        if all(figures["share_of_limit"] for figures in shares):
            least = [figures["median_ms"] * figures["share_of_limit"] for figures in shares]
            tokens = [row["case"]["tokens"] for row in own]
            axes.plot(tokens, least, "k--", label="limit of the machine")
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=layer)
    all_axes[0][0].set_ylabel("ms, forward")
    all_axes[0][0].legend(fontsize=6)
    figure.suptitle(_caption(result), fontsize=7)
    return _save(figure, path)


def _title(axes, result: dict) -> None:
    axes.set_title(_caption(result), fontsize=7)


def _caption(result: dict) -> str:
    machine = result["machine"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    return f"{where}, torch {machine['torch']}, commit {result['commit']}"


def _save(figure, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.tight_layout()
    with atomic_write(path) as partial:
        figure.savefig(partial, metadata={"Date": None})
    plt.close(figure)
    return path
