"""Linear probes on the features of the frozen encoders.

Their accuracy measures how much of a task the features contain, independently of the language
model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from examples.demo.example import Example

SEGMENTS = {"speech": 4}
"""Number of equal parts of an item whose mean features are concatenated; 1 by default."""
_ITERATIONS = 50
_PENALTY = 1e-3  # factor of the squared weights, added to the mean loss


def pooled(kind: str, pieces: Sequence[Tensor]) -> Tensor:
    """Returns the features of an item as one vector: the mean of rows; for speech, of each quarter.

    Args:
        kind: `"image"`, `"speech"` or `"audio"`.
        pieces: `[rows, C]` each; rows of zeros, which pad speech, are ignored.
    """
    rows = torch.cat(list(pieces)).float()
    rows = rows[rows.abs().amax(1) > 0]
    count = SEGMENTS.get(kind, 1)
    if len(rows) < count:
        rows = torch.cat([rows, rows[-1:].expand(count - len(rows), -1)])
    return torch.cat([part.mean(0) for part in rows.tensor_split(count)])


def probe(
    train: Tensor, labels: Sequence[str], test: Tensor, expected: Sequence[str], top: int = 5
) -> tuple[float, float]:
    """Returns top-1 and top-k accuracy of a multinomial logistic regression.

    Args:
        train: `[N, C]` training features.
        labels: label of each training item.
        test: `[M, C]` test features.
        expected: label of each test item; one without training items counts as wrong.
        top: k of the top-k accuracy.

    Returns:
        Share of items whose label is the likeliest, and among the `top` likeliest.
    """
    names = {name: number for number, name in enumerate(sorted(set(labels)))}
    mean, spread = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / spread, (test - mean) / spread
    target = torch.tensor([names[label] for label in labels])
    weight = torch.zeros(train.shape[1], len(names), requires_grad=True)
    bias = torch.zeros(len(names), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        fit = torch.nn.functional.cross_entropy(train @ weight + bias, target)
        value = fit + _PENALTY * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        ranked = (test @ weight + bias).argsort(1, descending=True)[:, :top]
    wanted = torch.tensor([names.get(label, -1) for label in expected])[:, None]
    hits = ranked == wanted
    return hits[:, 0].float().mean().item(), hits.any(1).float().mean().item()


def probe_tasks(
    features, examples: Mapping[str, Mapping[str, list[Example]]], tasks: Mapping[str, str]
) -> dict[str, tuple[float, float]]:
    """Fits probes for tasks about a single media item.

    Args:
        features: `MediaFeatures` of a run.
        examples: examples of `"train"` and `"test"`, by task.
        tasks: training task of each held-out task.

    Returns:
        Top-1 and top-5 accuracy of each held-out task.
    """
    results = {}
    for held_out, learned in tasks.items():
        sets = (examples["train"][learned], examples["test"][held_out])
        media = [[example.media[0] for example in own] for own in sets]
        features.prepare([item for own in media for item in own])
        vectors = [torch.stack([_vector(features, *item) for item in own]) for own in media]
        labels = [[example.answer for example in own] for own in sets]
        results[held_out] = probe(vectors[0], labels[0], vectors[1], labels[1])
    return results


def _vector(features, kind: str, path: Path) -> Tensor:
    return pooled(kind, features.item(kind, path).pieces)
