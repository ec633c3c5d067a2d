"""Routing statistics of held-out examples."""

from collections.abc import Mapping, Sequence

import torch

from examples.demo.example import Example
from unimoe_model.evaluation.question_routing import route_questions
from unimoe_model.evaluation.samples import Sample
from unimoe_model.generation import Answerer
from unimoe_model.training.run import Run

ROUTED_EXAMPLES = 60
"""Number of examples per task."""


def routed(
    run: Run, held_out: Mapping[str, Sequence[Example]]
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Shares of each expert by modality and layer, and the number of tokens behind them.

    Args:
        run: run of the MoE, with its last stage complete.
        held_out: held-out examples by task.
    """
    examples = [e for own in held_out.values() for e in own[:ROUTED_EXAMPLES]]
    stage = list(run.ids)[-1]
    answerer = Answerer.from_pretrained(run.folder(stage) / "model")
    run.features.prepare(media for example in examples for media in example.media)
    questions = (_question(number, example) for number, example in enumerate(examples))
    counts = route_questions(answerer, questions, run.features.item)
    shares = counts.shares()
    return shares, {modality: counts.tokens[modality] for modality in shares}


def _question(number: int, example: Example) -> Sample:
    media: dict[str, tuple] = {}
    for kind, path in example.media:
        media[kind] = (*media.get(kind, ()), path)
    return Sample(number, number + 1, example.question, media)
