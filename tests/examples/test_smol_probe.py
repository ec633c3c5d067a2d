"""Linear probes of frozen features."""

import pytest
import torch

from examples.demo.example import Example
from examples.smol.probe import pooled, probe, probe_tasks


def test_pooling_is_a_mean_without_what_fills_up():
    rows = torch.arange(24.0).reshape(8, 3) + 1
    assert torch.equal(pooled("image", [rows]), rows.mean(0))
    filled = torch.cat([rows, torch.zeros(3, 3)])
    quarters = rows.reshape(4, 2, 3).mean(1).flatten()
    assert torch.equal(pooled("speech", [filled]), quarters)
    assert torch.equal(pooled("speech", [rows[:4], rows[4:]]), quarters)
    assert pooled("speech", [rows[:2]]).shape == (12,)


def features(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = [number % 3 for number in range(count)]
    noise = torch.randn(count, 8, generator=generator)
    return noise + 4 * torch.eye(8)[labels], ["abc"[label] for label in labels]


def test_a_probe_finds_what_is_linear_and_no_more():
    (train, labels), (test, expected) = features(90, 0), features(30, 1)
    assert probe(train, labels, test, expected, top=2) == pytest.approx((1, 1), abs=0.1)
    noise = torch.randn(90, 8, generator=torch.Generator().manual_seed(2))
    assert probe(noise, labels, test, expected, top=1)[0] < 0.7
    assert probe(train, labels, test, ["unknown"] * 30) == (0, 0)


class Features:
    def __init__(self, vectors):
        self.vectors, self.prepared = vectors, []

    def prepare(self, media):
        self.prepared += media

    def item(self, kind, path):
        class Media:
            pieces = (self.vectors[path][None],)

        return Media


def test_held_out_tasks_are_probed_with_what_is_learned_from():
    (train, labels), (test, expected) = features(60, 0), features(12, 1)
    vectors = dict(enumerate([*train, *test]))
    own = [Example("word", "", label, (("audio", at),)) for at, label in enumerate(labels)]
    asked = [Example("digit", "", e, (("audio", 60 + at),)) for at, e in enumerate(expected)]
    store = Features(vectors)
    examples = {"train": {"word": own}, "test": {"digit": asked}}
    found = probe_tasks(store, examples, {"digit": "word"})
    assert found["digit"][0] > 0.8
    assert len(store.prepared) == 72
