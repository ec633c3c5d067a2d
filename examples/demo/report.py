"""The demo's results: metrics.json, plots, an HTML page and a printed table."""

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from examples.demo.plots import ARM_NAMES, save_accuracy_plot, save_loss_plot
from examples.demo.showcase import WorkedExample
from unimoe_model.evaluation.files import write_whole
from unimoe_model.evaluation.plots import save_routing_plot

TASK_NAMES = {
    "image_qa": "image QA",
    "spoken_word": "spoken word",
    "spoken_question": "spoken question about an image",
    "sound": "sound family",
    "video": "video motion",
    "text": "text",
}
STAND_INS = (
    "EfficientNet-Lite0 stands in for CLIP, aiSFX for BEATs, and a LLaMA of one million"
    " parameters, pretrained here on text, for Vicuna-7B; the speech encoder is the real"
    " Whisper tiny.en. Speech is synthetic (eSpeak NG), sounds are General MIDI instruments,"
    " videos are moving drawings. A video is the mean of its 8 frames, as in the paper, so the"
    " model cannot tell left from right."
)


@dataclass(frozen=True)
class Results:
    """Figures of a run; accuracies are shares in 0..1 by task.

    Attributes:
        accuracy: accuracy of the MoE.
        blind: accuracy of the most frequent training answer without the input.
        dense: accuracy of the dense model with the same active FLOPs.
        items: number of held-out items.
        seconds: training seconds by stage.
        throughput: throughput by layer, from `layer_throughput`.
        throughput_layer: sizes of that layer.
        losses: losses by arm and stage.
        routing: shares of experts by modality, `[layers, E]`.
        routed_tokens: number of tokens of each modality behind `routing`.
        top_k: experts per token.
        experts: name of each expert.
        seed: seed of the run.
        machine: fields of `Machine`: the machine, and the settings chosen for it.
        forecast: seconds by part that were forecast before the run.
    """

    accuracy: dict[str, float]
    blind: dict[str, float]
    dense: dict[str, float]
    items: dict[str, int]
    seconds: dict[str, float]
    throughput: dict[str, dict[str, float]]
    throughput_layer: dict[str, int]
    losses: dict[str, dict[str, list[float]]]
    routing: dict[str, torch.Tensor]
    routed_tokens: dict[str, int]
    top_k: int
    experts: list[str]
    seed: int
    machine: dict[str, Any]
    forecast: dict[str, float]

    @property
    def mean(self) -> dict[str, float]:
        """Mean accuracy over the tasks, of MoE, dense and blind."""
        return {arm: sum(own.values()) / len(own) for arm, own in self.columns.items()}

    @property
    def columns(self) -> dict[str, dict[str, float]]:
        """Accuracy by task of each column of the table."""
        return {"moe": self.accuracy, "dense": self.dense, "blind": self.blind}


def write_report(results: Results, examples: Sequence[WorkedExample], folder: Path) -> None:
    """Writes metrics.json, accuracy.png, loss.png, routing.png and report.html.

    Args:
        results: results to report.
        examples: the worked examples, whose files exist already.
        folder: output folder.
    """
    named = {
        arm: {TASK_NAMES[task]: value for task, value in by_task.items()}
        for arm, by_task in results.columns.items()
    }
    save_accuracy_plot(folder / "accuracy.png", named)
    save_loss_plot(folder / "loss.png", results.losses)
    save_routing_plot(
        folder / "routing.png",
        results.routing,
        results.experts,
        top_k=results.top_k,
        tokens=results.routed_tokens,
    )
    write_whole(folder / "report.html", _page(results, examples))
    metrics = {
        "accuracy": results.accuracy,
        "blind": results.blind,
        "dense": results.dense,
        "mean": results.mean,
        "items": results.items,
        "seconds": results.seconds,
        "throughput": results.throughput,
        "routing": {modality: share.tolist() for modality, share in results.routing.items()},
        "routed_tokens": results.routed_tokens,
        "examples": [asdict(example) for example in examples],
        "seed": results.seed,
        "machine": results.machine,
        "forecast": results.forecast,
    }
    write_whole(folder / "metrics.json", json.dumps(metrics, indent=1))


def print_results(results: Results, examples: Sequence[WorkedExample], folder: Path) -> None:
    """Prints the table, the worked examples and the location of the files."""
    print(f"\n{STAND_INS}\n")
    print(f"{'Held-out accuracy, %':<44}{'MoE':>8}{'dense':>8}{'blind':>8}{'items':>8}")
    for task, name in TASK_NAMES.items():
        row = (results.accuracy[task], results.dense[task], results.blind[task])
        cells = "".join(f"{100 * value:8.1f}" for value in row)
        print(f"  {name:<42}{cells}{results.items[task]:8d}")
    means = "".join(f"{100 * results.mean[name]:8.1f}" for name in ("moe", "dense", "blind"))
    print(f"  {'mean':<42}{means}\n")
    for example in examples:
        print(f"{example.title} ({', '.join(example.files)})")
        print(f"  asked: {example.question}")
        print(f"  answered: {example.answer}    (right: {example.expected})")
    layer = results.throughput_layer
    print(f"\nOne MoE layer ({_layer_text(layer)}), forward + backward:")
    for name, figures in results.throughput.items():
        print(f"  {name:<8}{figures['step_ms']:8.1f} ms{figures['tokens_per_s']:12.0f} tokens/s")
    print(f"\nEverything is in {folder}; open {folder / 'report.html'} in a browser.")


def _layer_text(layer: dict[str, int]) -> str:
    return (
        f"D {layer['hidden_size']}, F {layer['intermediate_size']}, {layer['num_experts']} experts,"
        f" top {layer['top_k']}, {layer['tokens']} tokens"
    )


def _page(results: Results, examples: Sequence[WorkedExample]) -> str:
    rows = "".join(
        _row(name, [own[task] for own in results.columns.values()], str(results.items[task]))
        for task, name in TASK_NAMES.items()
    )
    rows += _row("mean", list(results.mean.values()), "")
    heads = "".join(f"<th>{ARM_NAMES[arm]}</th>" for arm in results.columns)
    speed = "".join(
        f"<tr><td>{name}</td><td>{f['forward_ms']:.1f}</td><td>{f['step_ms']:.1f}</td>"
        f"<td>{f['tokens_per_s']:.0f}</td></tr>"
        for name, f in results.throughput.items()
    )
    times = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{value:.0f}</td></tr>"
        for name, value in results.seconds.items()
    )
    shown = "".join(_example(example) for example in examples)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Uni-MoE demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222 }}
table {{ border-collapse: collapse; margin: 0.5rem 0 }}
td, th {{ padding: 0.15rem clamp(0.3rem, 1.5vw, 0.9rem); text-align: right;
  border-bottom: 1px solid #e4e4e4 }}
td:first-child, th:first-child {{ text-align: left }}
img {{ max-width: 100% }}
.plot img {{ width: 36rem; cursor: zoom-in }}
.examples {{ display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)) }}
.examples > div {{ border: 1px solid #e4e4e4; border-radius: 6px; padding: 0.8rem }}
.examples img {{ width: 128px; image-rendering: pixelated; display: block }}
.examples audio {{ width: 100% }}
.note {{ color: #555 }}
</style></head><body>
<h1>Uni-MoE demo</h1>
<p class="note">{STAND_INS} Seed {results.seed}.</p>
<h2>Held-out accuracy, %</h2>
<table><tr><th>task</th>{heads}<th>items</th></tr>{rows}</table>
<p class="note">An answer is right if it is the expected one letter for letter.
The best of a row is bold. Dense: one FFN of width K*F, the same active FLOPs,
batches, steps and optimiser.
Blind: the most frequent training answer without the input.</p>
{_plot("accuracy.png", "accuracy by task")}
<h2>It answers</h2><div class="examples">{shown}</div>
<p class="note">Drawings in the video: OpenMoji, CC BY-SA 4.0.</p>
<h2>Loss</h2>{_plot("loss.png", "loss of every stage")}
<h2>Routing</h2><p class="note">Share of each modality's routed rows that every expert takes. The
experts are named after what they were trained on in stage 2.</p>
{_plot("routing.png", "experts by modality and layer")}
<h2>Speed of one MoE layer</h2><p class="note">{_layer_text(results.throughput_layer)}; medians of
interleaved rounds on this machine.</p>
<table><tr><th>layer</th><th>forward, ms</th><th>forward + backward, ms</th><th>tokens/s</th></tr>
{speed}</table>
<h2>Time, s</h2><table><tr><th>stage</th><th>seconds</th></tr>{times}</table>
</body></html>
"""


def _example(example: WorkedExample) -> str:
    media = "".join(
        f'<audio controls src="{name}"></audio>'
        if name.endswith(".wav")
        else f'<img src="{name}" alt="{html.escape(example.title)}">'
        for name in example.files
    )
    verdict = "right" if example.answer == example.expected else f"expected {example.expected}"
    return (
        f"<div><b>{html.escape(example.title)}</b>{media}<p>{html.escape(example.question)}<br>"
        f"<b>{html.escape(example.answer) or '(nothing)'}</b>"
        f' <span class="note">({html.escape(verdict)})</span></p></div>'
    )


def _row(name: str, values: Sequence[float], items: str) -> str:
    """A row of the table; the best values are bold."""
    texts = [f"{100 * value:.1f}" for value in values]
    best = max(texts, key=float)
    cells = "".join(f"<td>{f'<b>{t}</b>' if t == best else t}</td>" for t in texts)
    return f"<tr><td>{html.escape(name)}</td>{cells}<td>{items}</td></tr>"


def _plot(file: str, text: str) -> str:
    """A picture that is enlarged by a click."""
    return f'<a class="plot" href="{file}"><img src="{file}" alt="{text}"></a>'
