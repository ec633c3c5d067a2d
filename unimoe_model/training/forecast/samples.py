"""Lengths of a stage's samples, the shape of its batches, and its number of tokens."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest

import numpy as np

from unimoe_model.configuration import MEDIA_KINDS, UniMoEConfig
from unimoe_model.data.conversation_objects import Conversation
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.tokenization import IGNORED, truncated
from unimoe_model.training.forecast.step import BatchShape
from unimoe_model.training.recipe import Stage

_TOKENISED, _LONGEST = 2000, 200
"""Number of samples of a file to tokenize: evenly spaced ones, and those with the longest texts."""

_TURNS = 8
"""Number of rows that represent the shares of files in a batch."""


@dataclass(frozen=True)
class Lengths:
    """Statistics of the samples of a file.

    Attributes:
        mean: mean tokens per sample, soft tokens included.
        longest: tokens of the longest sample.
        answers: mean labelled tokens per sample.
        spread: standard deviation of labelled tokens.
        most_answers: maximum labelled tokens of a sample.
        media: maximum number of items of each kind in a sample.
    """

    mean: float
    longest: int
    answers: float
    spread: float
    most_answers: int
    media: dict[str, int]


def measure(
    samples: Sequence[Conversation],
    processor: UniMoEProcessor,
    config: UniMoEConfig,
    max_length: int,
    is_distilled: bool = False,
) -> Lengths:
    """Measures lengths on up to 2,200 samples of a file. A recording counts as one piece.

    All tokens of samples that are distilled are labelled.
    """
    step = math.ceil(len(samples) / _TOKENISED)
    spaced = [samples[at] for at in range(0, len(samples), step)]
    long = nlargest(_LONGEST, samples, key=lambda s: _guess(s, config))
    ids = config.media_token_ids
    found = []
    for sample in (*spaced, *long):
        text = processor.tokenize(sample.turns)
        soft = [config.num_soft_tokens(kind) for kind, _ in sample.media]
        text, fitting = truncated(text, ids, soft, max_length)
        text = text.expanded(ids, soft[:fitting])
        labels = text.ids if is_distilled else text.labels
        found.append((len(text.ids), sum(label != IGNORED for label in labels[1:])))
    lengths, answers = np.array(found).T
    few = len(spaced)
    return Lengths(
        lengths[:few].mean(),
        int(lengths.max()),
        answers[:few].mean(),
        answers[:few].std(),
        int(answers.max()),
        _most_media(samples),
    )


def _most_media(samples: Sequence[Conversation]) -> dict[str, int]:
    """Maximum number of items per sample, for each media kind that occurs."""
    most: Counter[str] = Counter()
    for sample in samples:
        most |= Counter(kind for kind, _ in sample.media)
    return {kind: most[kind] for kind in MEDIA_KINDS if kind in most}


def batch_shape(
    stage: Stage, lengths: dict[str, Lengths], counts: dict[str, int], config: UniMoEConfig
) -> BatchShape:
    """The largest likely batch of a stage, with all rows as long as the longest sample.

    Packed rows have `max_length` tokens and hold as many samples as fit on average. The number of
    labelled tokens is four standard deviations above the mean of a batch; media are distributed
    like the data. Of alternating streams, the one with the longest sample is used.
    """
    shapes = []
    held = stage.max_length / _mean(stage, lengths, counts) if stage.pack else 1.0
    held = max(1.0, held)
    for stream in stage.streams:
        shares = _shares(stage, stream, counts)
        own = {name: lengths[name] for name in stream}
        mean = sum(shares[name] * x.answers for name, x in own.items())
        square = sum(shares[name] * (x.spread**2 + x.answers**2) for name, x in own.items())
        spread = math.sqrt(max(0.0, square - mean**2) / stage.optimization.batch_size)
        answers = min(mean + 4 * spread, max(x.most_answers for x in own.values()))
        length = stage.max_length if stage.pack else max(x.longest for x in own.values())
        turns = {name: max(1, round(_TURNS * share)) for name, share in shares.items()}
        least = math.gcd(*turns.values())
        media = [
            {kind: math.ceil(items * held) for kind, items in own[name].media.items()}
            for name, n in turns.items()
            for _ in range(n // least)
        ]
        shapes.append(_fitting(length, math.ceil(max(1, answers) * held), media, config))
    return max(shapes, key=lambda shape: shape.length)


def assumed_shape(stage: Stage, max_length: int, config: UniMoEConfig) -> BatchShape:
    """The batch assumed for missing data, with rows of `max_length` tokens.

    Each row has one item of every kind whose connector is trained; half of its text is labelled.
    """
    trained = {part.part.partition(".")[2] for part in stage.train}
    media = {kind: 1 for kind in MEDIA_KINDS if kind in trained}
    shape = _fitting(max_length, 1, [media], config)
    soft = sum(n * config.num_soft_tokens(kind) for kind, n in shape.media[0].items())
    return BatchShape(max_length, max(1, (max_length - soft) // 2), shape.media)


def tokens_of(stage: Stage, lengths: dict[str, Lengths], counts: dict[str, int]) -> int:
    """Number of tokens that a stage sees, without padding, as in its `metrics.json`."""
    if stage.epochs is None:
        samples = stage.optimization.steps * stage.optimization.batch_size
    else:
        samples = stage.epochs * sum(n * counts[name] for name, n in stage.streams[0].items())
    return round(samples * _mean(stage, lengths, counts))


def packed_rows(stage: Stage, lengths: dict[str, Lengths], counts: dict[str, int]) -> int:
    """Expected number of rows that the samples of a batch are packed into."""
    tokens = stage.optimization.batch_size * _mean(stage, lengths, counts)
    return min(stage.optimization.batch_size, math.ceil(tokens / stage.max_length))


def _mean(stage: Stage, lengths: dict[str, Lengths], counts: dict[str, int]) -> float:
    """Mean tokens per sample of a stage, soft tokens included."""
    means = [
        sum(share * lengths[name].mean for name, share in _shares(stage, stream, counts).items())
        for stream in stage.streams
    ]
    return sum(means) / len(means)


def _shares(stage: Stage, stream: dict[str, float], counts: dict[str, int]) -> dict[str, float]:
    """Share of each data entry in the samples of a stream."""
    size = {
        name: weight * (1 if stage.epochs is None else counts[name])
        for name, weight in stream.items()
    }
    return {name: value / sum(size.values()) for name, value in size.items()}


def _fitting(
    length: int, answers: int, media: Sequence[dict[str, int]], config: UniMoEConfig
) -> BatchShape:
    """A batch of rows of `length` tokens, without media that do not fit."""
    rows = []
    for held in media:
        room, kept = length - 1, {}
        for kind, pieces in held.items():
            soft = config.num_soft_tokens(kind)
            if fitting := min(pieces, room // soft):
                kept[kind] = fitting
                room -= fitting * soft
        rows.append(kept)
    return BatchShape(length, max(1, min(answers, length - 1)), tuple(rows))


def _guess(sample: Conversation, config: UniMoEConfig) -> float:
    """Estimates the tokens of a sample without tokenizing it."""
    text = sum(len(user) + len(answer) for user, answer in sample.turns)
    return text / 4 + sum(config.num_soft_tokens(kind) for kind, _ in sample.media)
