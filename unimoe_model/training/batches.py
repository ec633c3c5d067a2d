"""Batches of a stage, as a pure function of the step."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache, partial
from itertools import pairwise

import torch

from unimoe_model.configuration import MEDIA_KINDS
from unimoe_model.data.conversation_objects import Conversation
from unimoe_model.data.encoded_media import EncodedMedia, Row
from unimoe_model.data.indexed_files import Media
from unimoe_model.data.mixture import Epochs, Mixture, Turns
from unimoe_model.data.packing import packed
from unimoe_model.data.windows import Shuffle
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.tokenization import TokenizedText
from unimoe_model.training.answer_words import answers_within_text
from unimoe_model.training.optimization import Optimization
from unimoe_model.training.ranks import Ranks
from unimoe_model.training.recipe import Stage

Samples = Mapping[str, Sequence[Conversation]]
Tokenize = Callable[[Sequence[tuple[str, str]]], TokenizedText]
_CACHED_SAMPLES = 1 << 14
"""Maximum number of samples whose tokenized texts are cached; with more, few would be reused."""
DISTILLED = "distilled"
"""Key of a part whose answers are distilled, not learned; its value is the weight of the loss."""


def sample_order(
    stage: Stage, samples: Samples, seed: int, shuffles: Mapping[str, Shuffle] | None = None
) -> Mixture | Turns | Epochs:
    """Builds the order in which a stage sees its samples.

    Args:
        stage: stage with its data, weights and seed.
        samples: conversations by data name.
        seed: seed of the run.
        shuffles: data that are shuffled in windows, by name.
    """
    own = {name: samples[name] for name in stage.data}
    if stage.epochs is not None:
        repeats = {name: int(weight) for name, weight in stage.streams[0].items()}
        return Epochs(own, repeats, (seed, stage.seed), shuffles)
    mixtures = [
        Mixture(own, weights, (seed, stage.seed + number), shuffles)
        for number, weights in enumerate(stage.streams)
    ]
    return mixtures[0] if len(mixtures) == 1 else Turns(mixtures)


class Batches:
    """Model inputs and labels of each step, divided into accumulation parts.

    Args:
        processor: tokenizes and pads.
        order: `sample_order` of the stage.
        stage: stage with its maximum lengths and whether rows are packed.
        optimization: settings with the batch size and the number of parts.
        features: returns the features of a media file, given its kind and location.
        ranks: processes that train together, each of which has a share of every part; None for a
            single process.
        pad_to_multiple_of: packed rows are padded to a multiple of it, up to the maximum length,
            except in parts with a limit of tokens.
    """

    def __init__(
        self,
        processor: UniMoEProcessor,
        order: Mixture | Turns | Epochs,
        stage: Stage,
        optimization: Optimization,
        features: Callable[[str, Media], EncodedMedia],
        ranks: Ranks | None = None,
        pad_to_multiple_of: int = 1,
    ):
        self._processor = processor
        self._order = order
        self._stage = stage
        self._optimization = optimization
        self._features = features
        self._ranks = ranks or Ranks()
        self._multiple = pad_to_multiple_of if stage.pack else 1
        tokenize = processor.tokenize
        if stage.objective == "words":
            tokenize = partial(_tokenize_words, processor, frozenset(processor.stop_token_ids))
        cached = lru_cache(_CACHED_SAMPLES)(tokenize)
        self._tokenize = cached if order.total <= _CACHED_SAMPLES else tokenize

    def samples(self, step: int) -> list[Conversation]:
        """The samples of a step, over all processes."""
        return self._order.batch(step, self._optimization.batch_size)

    def places(self, step: int) -> list[tuple[str, int]]:
        """Data name and index of each sample of a step."""
        return self._order.places(step, self._optimization.batch_size)

    def __call__(self, step: int) -> list[dict]:
        """This process's share of each part of a step's batch.

        Samples to be distilled are in parts of their own, which have the key `DISTILLED`, and
        labels at all of their tokens: a teacher also predicts the tokens of questions.

        Raises:
            ValueError: If a part has fewer samples than there are processes.
        """
        samples, distilled = self.samples(step), self._stage.distill
        if not distilled:
            return self._parts(samples)
        named = list(zip(self.places(step), samples, strict=True))
        learned = [sample for (name, _), sample in named if name not in distilled]
        kept = [sample for (name, _), sample in named if name in distilled]
        weight = torch.tensor(self._stage.distill_weight)
        parts = self._parts(kept, self._tokenize_labelled)
        return self._parts(learned) + [part | {DISTILLED: weight} for part in parts]

    def _parts(
        self, samples: Sequence[Conversation], tokenize: Tokenize | None = None
    ) -> list[dict]:
        if not samples:
            return []
        world = self._ranks.world_size
        if self._stage.part_tokens is None:
            parts = min(self._optimization.accumulation, len(samples))
            ends = [len(samples) * number // parts for number in range(parts + 1)]
            shares = [self._ranks.share(samples[a:b]) for a, b in pairwise(ends)]
            held = [self._packed(self._rows(share, tokenize)) for share in shares]
            return [self._collate(rows, self._multiple) for rows in held]
        rows = self._packed(self._rows(samples, tokenize), world)
        return [
            self._collate(self._ranks.share(part))
            for part in parts_of(rows, self._stage.part_tokens * world, world)
        ]

    def whole(self, step: int) -> dict:
        """The whole batch of a step, over all processes, one sample per row."""
        return self._collate(self._rows(self.samples(step)))

    def _rows(self, samples: Sequence[Conversation], tokenize: Tokenize | None = None) -> list[Row]:
        texts = [(tokenize or self._tokenize)(sample.turns) for sample in samples]
        media = {
            kind: [
                self._features(kind, path)
                for sample in samples
                for held, path in sample.media
                if held == kind
            ]
            for kind in MEDIA_KINDS
        }
        return self._processor.rows(texts, media, self._stage.max_length)

    def _tokenize_labelled(self, turns: Sequence[tuple[str, str]]) -> TokenizedText:
        ids = self._tokenize(turns).ids
        return TokenizedText(ids, ids)

    def _packed(self, rows: list[Row], least: int = 1) -> list[Row]:
        return packed(rows, self._stage.max_length, least) if self._stage.pack else rows

    def _collate(self, rows: Sequence[Row], multiple: int = 1) -> dict:
        if multiple == 1:
            return dict(self._processor.collate(rows))
        longest = max(len(row.text.ids) for row in rows)
        length = min(multiple * math.ceil(longest / multiple), self._stage.max_length)
        return dict(self._processor.collate(rows, min_length=length))


def _tokenize_words(
    processor: UniMoEProcessor, stops: Collection[int], turns: Sequence[tuple[str, str]]
) -> TokenizedText:
    return answers_within_text(processor.tokenize(turns), processor.tokenizer, stops)


def parts_of(rows: Sequence[Row], tokens: int, least: int) -> list[list[Row]]:
    """Splits the rows of a batch, in order, into parts of at most `tokens` padded tokens.

    Args:
        rows: rows of a batch.
        tokens: maximum tokens per part, padding included.
        least: minimum rows per part, whatever their length.
    """
    parts: list[list[Row]] = [[]]
    for row in rows:
        longest = max(len(r.text.ids) for r in (*parts[-1], row))
        if len(parts[-1]) >= least and (len(parts[-1]) + 1) * longest > tokens:
            parts.append([])
        parts[-1].append(row)
    wanted = least - len(parts[-1])
    if len(parts) > 1 and wanted > 0:
        last = parts.pop()
        if len(parts[-1]) - wanted < least:
            parts[-1] += last
        else:
            parts.append(parts[-1][-wanted:] + last)
            del parts[-2][-wanted:]
    return parts
