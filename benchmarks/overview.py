"""Draws the figure of README.md, `docs/images/speed.svg`, from committed results.

python -m benchmarks.overview
"""

import json
from pathlib import Path

from unimoe_kernels import atomic_write

from .plots import COLORS

RESULTS = Path(__file__).parent / "results"
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "speed.svg"
# By results file: title, and caption and key of each row.
PANELS = {
    "amd-epyc-cpu-family-26-model-2-2-threads-cpu-goals-2026-11-23.json": (
        "2 cores of an AMD EPYC (Zen 5, AVX-512)",
        {
            "Uni-MoE, 2048 tokens\nforward, float32": "medium-unimoe-T2048-forward-natural-float32",
            "Uni-MoE, 2048 tokens\ntraining, float32": (
                "medium-unimoe-T2048-training-natural-float32"
            ),
            "Qwen3, 1024 tokens\nforward, bfloat16": "medium-qwen3-T1024-forward-natural-bfloat16",
            "Qwen3, 1024 tokens\ntraining, bfloat16": (
                "medium-qwen3-T1024-training-natural-bfloat16"
            ),
            "Mixtral, 1 token\nforward, bfloat16": "medium-mixtral-T1-forward-natural-bfloat16",
        },
    ),
    "nvidia-h100-80gb-hbm3-goals-2026-11-27.json": (
        "NVIDIA H100",
        {
            "Uni-MoE 7B, 16 tokens\nforward, bfloat16": "unimoe-T16-forward-natural",
            "Uni-MoE 7B, 4096 tokens\nforward, bfloat16": "unimoe-T4096-forward-natural",
            "Uni-MoE 7B, 32768 tokens\nforward, bfloat16": "unimoe-T32768-forward-natural",
        },
    ),
}
PROVIDERS = (
    "looped",
    "transformers-eager",
    "transformers-grouped_mm",
    "zentorch",
    "liger",
    "ours",
)


def draw(path: Path = FIGURE) -> None:
    """Draws speed relative to a dense layer of the same active multiplications."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "unimoe"
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    heights = [len(rows) for _, rows in PANELS.values()]
    figure, all_axes = plt.subplots(
        len(PANELS), 1, figsize=(8, 0.8 * sum(heights) + 1.4), height_ratios=heights
    )
    for axes, (name, (title, rows)) in zip(all_axes, PANELS.items(), strict=True):
        result = json.loads((RESULTS / name).read_text(encoding="utf-8"))
        found = {row["key"]: row["providers"] for row in result["rows"]}
        held = [
            {name: row[name] for name in PROVIDERS if name in row}
            for row in (found[f"moe_layer[{key}]"] for key in rows.values())
        ]
        height = 0.85 / max(map(len, held))
        for i, row in enumerate(held):
            for place, provider in enumerate(row):
                speed = 1 / row[provider]["ratio"]
                axes.barh(i + place * height, speed, height, color=COLORS[provider])
        axes.set_yticks([i + 0.35 for i in range(len(rows))], rows, fontsize=8)
        axes.set_ylim(len(rows) - 0.05, -0.2)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_title(f"{title}, torch {result['machine']['torch']}", fontsize=9)
    all_axes[-1].set_xlabel("speed relative to a dense layer of the same active multiplications")
    figure.legend(
        [Patch(color=COLORS[provider]) for provider in PROVIDERS],
        PROVIDERS,
        ncols=len(PROVIDERS),
        loc="upper center",
        fontsize=8,
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw()
