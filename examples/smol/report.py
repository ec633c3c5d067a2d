"""The report.html of a run: results, examples, retained text ability, losses, times and credits.

The page is for local use: it shows pictures whose licences differ from that of this repository.
"""

import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.demo.example import Example
from examples.demo.plots import save_loss_plot
from examples.smol.credits import CREDITS, Credit
from examples.smol.data import Examples
from unimoe_model.evaluation.files import write_whole

STAND_INS = (
    "Whisper base is the real one. EfficientNet-Lite0 and aiSFX are stand-ins for the paper's CLIP"
    " and BEATs, and SmolLM2-135M-Instruct for Vicuna-7B. Most speech is synthetic (eSpeak NG)."
)
SHOWN = 12
_PACKAGES = {
    "gemojione": "ruby-gemojione",
    "twemoji": "firefox-esr",
    "noto": "fonts-noto-color-emoji",
    "stamps": "tuxpaint-stamps-default",
    "asterisk": "asterisk-core-sounds-en-wav",
    "pocketsphinx": "pocketsphinx-testdata",
    "sonic_pi": "sonic-pi-samples",
    "devil": "dict-devil",
}
"""Debian package of each source that has one."""


@dataclass(frozen=True)
class Report:
    """The contents of the page.

    Attributes:
        arm: one of `ARMS`.
        seed: seed of the run.
        machine: description of the machine, and the settings chosen for it.
        table: lines of the results.
        text: lines of `text_lines`.
        reply: line of `reply_line`.
        routing: lines of `use_lines`; empty for a dense model.
        losses: losses by stage.
        seconds: seconds by stage.
        tokens: tokens by stage.
        shown: examples with the model's answers.
        packages: Debian packages that were available.
    """

    arm: str
    seed: int
    machine: str
    table: str
    text: str
    reply: str
    routing: str
    losses: dict[str, list[float]]
    seconds: dict[str, float]
    tokens: dict[str, int]
    shown: list[tuple[Example, str]]
    packages: Sequence[str]


def shown_examples(
    examples: Examples, answers: Mapping[str, Sequence[str]], tasks: Sequence[str]
) -> list[tuple[Example, str]]:
    """Returns the first pictures of tasks, alternating between tasks, with the model's answers."""
    found = []
    for number in range(SHOWN):
        task = tasks[number % len(tasks)]
        index = number // len(tasks)
        if index < len(answers.get(task, ())):
            found.append((examples["test"][task][index], answers[task][index]))
    return found


def credits_of(packages: Sequence[str]) -> list[Credit]:
    """Returns the credits of all sources except those whose Debian package was not available."""
    return [
        credit
        for name, credit in CREDITS.items()
        if name not in _PACKAGES or _PACKAGES[name] in packages
    ]


def write_report(report: Report, folder: Path) -> Path:
    """Writes loss.png and report.html, and returns the path of the latter."""
    save_loss_plot(folder / "loss.png", {report.arm: report.losses})
    page = folder / "report.html"
    write_whole(page, _page(report, folder))
    return page


def _page(report: Report, folder: Path) -> str:
    times = "".join(
        _row([name, f"{seconds:.0f}", f"{report.tokens[name]}", _rate(report, name)])
        for name, seconds in report.seconds.items()
    )
    credits = "".join(
        _row([own.title, own.package, own.authors, own.licence])
        for own in credits_of(report.packages)
    )
    shown = "".join(_example(*own, folder) for own in report.shown)
    routing = f"<h2>Experts</h2><pre>{html.escape(report.routing)}</pre>" if report.routing else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>A small Uni-MoE</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222 }}
table {{ border-collapse: collapse }}
td, th {{ padding: 0.15rem 0.8rem 0.15rem 0; text-align: left; border-bottom: 1px solid #e4e4e4 }}
pre {{ overflow-x: auto; background: #f6f6f6; padding: 0.8rem }}
.text {{ white-space: pre-wrap }}
.examples {{ display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)) }}
.examples img {{ width: 128px; display: block }}
.note {{ color: #555 }}
</style></head><body>
<h1>A small Uni-MoE, {html.escape(report.arm)}, seed {report.seed}</h1>
<p class="note">{html.escape(STAND_INS)} {html.escape(report.machine)}.</p>
<h2>Held-out accuracy</h2><pre>{html.escape(report.table)}</pre>
<p class="note">An answer is right if it is the expected one letter for letter. Start: the model
before training, on the first questions. Blind: the most frequent training answer without the input.
Probe: a linear map of the same features. Top 5: the right name is among the likeliest five of all
names.</p>
<h2>It answers</h2><div class="examples">{shown}</div>
<p>{html.escape(report.reply)}.</p>
<h2>Text kept</h2><pre class="text">{html.escape(report.text)}</pre>
{routing}<h2>Loss</h2><img src="loss.png" alt="loss of every stage" style="max-width: 100%">
<h2>Time</h2><table><tr><th>stage</th><th>seconds</th><th>tokens</th><th>tokens/s</th></tr>{times}
</table>
<h2>Credits</h2><p class="note">Keep this page and the weights to yourself: they hold or derive from
what other licences cover.</p>
<table><tr><th>what</th><th>from</th><th>by</th><th>licence</th></tr>{credits}</table>
</body></html>
"""


def _rate(report: Report, stage: str) -> str:
    return f"{report.tokens[stage] / max(report.seconds[stage], 1e-9):.0f}"


def _row(cells: Sequence[Any]) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>"


def _example(example: Example, answer: str, folder: Path) -> str:
    (picture,) = (path for kind, path in example.media if kind == "image")
    place = html.escape(os.path.relpath(picture, folder))
    verdict = "right" if answer == example.answer else f"expected {example.answer}"
    return (
        f'<div><img src="{place}" alt="{html.escape(example.answer)}">'
        f"{html.escape(example.question)}<br><b>{html.escape(answer) or '(nothing)'}</b>"
        f' <span class="note">({html.escape(verdict)})</span></div>'
    )
