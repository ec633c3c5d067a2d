"""Which experts the tokens of held-out questions go to, where features of media are at hand."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from unimoe_model.evaluation.routing import RoutingCounts
from unimoe_model.evaluation.samples import Sample, media_arguments
from unimoe_model.generation import Answerer

BATCH = 64
"""Questions that go through the model at once."""


def route_questions(
    answerer: Answerer, questions: Iterable[Sample], features: Callable[[str, Any], Any]
) -> RoutingCounts:
    """Routes questions in batches.

    Args:
        answerer: of an MoE model.
        questions: their answers and options are not looked at.
        features: returns what the model is shown of a media file, by kind and path.

    Returns:
        The counts, over all questions together.

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
