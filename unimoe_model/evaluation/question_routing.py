"""Routing statistics of held-out questions whose media features are cached."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from unimoe_model.evaluation.routing import RoutingCounts
from unimoe_model.evaluation.samples import Sample, media_arguments
from unimoe_model.generation import Answerer

BATCH = 64
"""Batch size."""


def route_questions(
    answerer: Answerer, questions: Iterable[Sample], features: Callable[[str, Any], Any]
) -> RoutingCounts:
    """Counts routed rows of questions.

    Args:
        answerer: an MoE model with its processor.
        questions: questions; answers and options are ignored.
        features: returns the features of a media file by kind and path.

    Returns:
        The counts over all questions.

    Raises:
        ValueError: If the model has no MoE layers.
    """
    counts = RoutingCounts(answerer.model)
    remaining = iter(questions)
    while group := list(islice(remaining, BATCH)):
        rows = [_row(answerer, question, features) for question in group]
        batch = answerer.processor.collate(rows)
        counts.add({name: tensor for name, tensor in batch.items() if name != "labels"})
    return counts


def _row(answerer: Answerer, question: Sample, features: Callable[[str, Any], Any]):
    shown: Mapping[str, Sequence[Any]] = {
        kind: [features(kind, path) for path in paths] for kind, paths in question.media.items()
    }
    return answerer.row(question.question, **media_arguments(shown))
