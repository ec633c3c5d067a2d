"""Evaluation of a model on a data file, run by `unimoe eval`."""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from unimoe_model.data.content_key import content_key
from unimoe_model.data.encoded_media import SENSES, Row
from unimoe_model.evaluation.answer_log import AnswerLog
from unimoe_model.evaluation.files import file_digest, folder_digest, write_whole
from unimoe_model.evaluation.metrics import METRICS, Metric
from unimoe_model.evaluation.metrics.score import Score
from unimoe_model.evaluation.samples import (
    Sample,
    asked_media,
    line_named,
    media_arguments,
    read_samples,
)
from unimoe_model.generation import Answerer
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.training.progress import BarReporter, ProgressReporter
from unimoe_model.value_types import require_at_least

MAX_NEW_TOKENS = 512
"""The limit of the published evaluation for short answers and captions."""


def evaluate_file(
    model: Path,
    data: Path,
    metric: str,
    output: Path,
    max_new_tokens: int = MAX_NEW_TOKENS,
    limit: int | None = None,
    reporter: ProgressReporter | None = None,
    batch_size: int = 1,
    features: Callable[[str, Path], Any] | None = None,
    identity: Callable[[Sequence[tuple[str, Path]]], str] | None = None,
) -> Score:
    """Generates outputs greedily, scores them, and writes `answers.jsonl` and `score.json`.

    Outputs are written one by one. The same call resumes after an interruption, and may then have
    another `limit`.

    Args:
        model: model folder.
        data: data file in the format of `read_samples`.
        metric: one of `METRICS`.
        output: folder to write.
        max_new_tokens: maximum tokens per output.
        limit: maximum number of questions; None for all.
        reporter: shows progress; a progress bar by default.
        batch_size: number of questions per batch.
        features: returns precomputed features of a media file, given its kind and path; None reads
            and encodes the files.
        identity: returns a hash of the contents of media, given their kinds and paths, and of the
            encoders that encode them; None loads the encoders for it.

    Returns:
        The score, which is also written to `score.json`.

    Raises:
        ModuleNotFoundError: If the metric requires a package that is not installed.
        ValueError: If an argument or the data file is invalid (nothing is written), `output` holds
            outputs of another model, data file, media, encoder or setting, or media cannot be
            read (the message names the line).
    """
    require_at_least(1, max_new_tokens=max_new_tokens, limit=limit)
    lines = scored_samples(data, metric, limit)
    samples, scored = lines[:limit], METRICS[metric]
    if not (model / "config.json").is_file():
        raise ValueError(f"model ({model}) must be a folder with a config.json")
    run = {
        "model": folder_digest(model),
        "data": file_digest(data),
        "media_and_encoders": (identity or partial(_identity, model))(
            [one for line in lines for one in asked_media(line)]
        ),
        "metric": metric,
        "max_new_tokens": max_new_tokens,
    }
    with AnswerLog(output, run, [sample.id for sample in samples]) as log:
        ask = partial(_row, data, scored, features)
        shown = reporter or BarReporter()
        _answer_rest(log, model, samples, ask, max_new_tokens, shown, batch_size)
        score = scored.score(samples, log.answers[: len(samples)])
        figures = _figures(score, samples, run) | {"model": str(model), "data": str(data)}
        write_whole(output / "score.json", json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    return score


def _identity(model: Path, media: Sequence[tuple[str, Path]]) -> str:
    """Hash of the contents of media, and of the encoders that encode them."""
    processor = UniMoEProcessor.from_pretrained(model)
    digest = hashlib.sha256()
    for sense in sorted({SENSES[kind] for kind, _ in media}):
        digest.update(processor.encoder(sense).fingerprint().encode())
    for kind, path in media:
        digest.update(f"{kind} {content_key(path)}".encode())
    return digest.hexdigest()[:16]


def scored_samples(data: Path, metric: str, limit: int | None = None) -> list[Sample]:
    """Reads all samples of a data file and checks them for a metric.

    Args:
        data: data file in the format of `read_samples`.
        metric: one of `METRICS`.
        limit: number of samples that will be scored; None for all.

    Raises:
        ModuleNotFoundError: If the metric requires a package that is not installed.
        ValueError: If the metric is unknown, a line cannot be scored, or there are too few lines.
    """
    if metric not in METRICS:
        raise ValueError(f"metric ({metric!r}) must be one of {', '.join(METRICS)}")
    scored = METRICS[metric]
    scored.require()
    lines = read_samples(data, scored.check)
    if len(lines[:limit]) < scored.fewest_items:
        raise ValueError(
            f"data ({data}) has {len(lines[:limit])} lines within the limit; metric {metric} needs"
            f" at least {scored.fewest_items}"
        )
    return lines


def _answer_rest(
    log: AnswerLog,
    model: Path,
    samples: Sequence[Sample],
    ask: Callable[[Answerer, Sample], Row],
    max_new_tokens: int,
    reporter: ProgressReporter,
    batch_size: int,
) -> None:
    done = min(len(log.answers), len(samples))
    if done == len(samples):
        return
    answerer = Answerer.from_pretrained(model)
    reporter.start("eval", len(samples), done)
    try:
        for start in range(done, len(samples), batch_size):
            group = samples[start : start + batch_size]
            rows = [ask(answerer, sample) for sample in group]
            for answer in answerer.answer_rows(rows, max_new_tokens):
                log.append(answer)
            reporter.advance(len(group))
    finally:
        reporter.finish()


def _row(
    data: Path,
    metric: Metric,
    features: Callable[[str, Path], Any] | None,
    answerer: Answerer,
    sample: Sample,
) -> Row:
    media = sample.media
    if features is not None:
        media = {kind: [features(kind, path) for path in media[kind]] for kind in media}
    with line_named(data, sample):
        return answerer.row(metric.question(sample), **media_arguments(media))


def _figures(score: Score, samples: Sequence[Sample], run: dict[str, Any]) -> dict[str, Any]:
    per_item = zip(samples, score.per_item, strict=True)
    return {
        "metric": run["metric"],
        "value": score.value,
        "items": len(samples),
        **score.details,
        "max_new_tokens": run["max_new_tokens"],
        "per_item": [{"id": sample.id, "value": value} for sample, value in per_item],
    }
