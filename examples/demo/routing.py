"""Routing statistics of held-out examples."""

from collections.abc import Mapping, Sequence

import torch

from examples.demo.example import Example
from unimoe_model.evaluation.routing import RoutingCounts
from unimoe_model.evaluation.samples import media_arguments
from unimoe_model.generation import Answerer
from unimoe_model.training.run import Run

ROUTED_EXAMPLES, _BATCH = 60, 64
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
    counts = RoutingCounts(answerer.model)
    for start in range(0, len(examples), _BATCH):
        rows = []
        for example in examples[start : start + _BATCH]:
            media: dict[str, list] = {}
            for kind, path in example.media:
                media.setdefault(kind, []).append(run.features.item(kind, path))
            rows.append(answerer.row(example.question, **media_arguments(media)))
        batch = answerer.processor.collate(rows)
        counts.add({name: tensor for name, tensor in batch.items() if name != "labels"})
    shares = counts.shares()
    return shares, {modality: counts.tokens[modality] for modality in shares}
