"""What is measured of a run, on runs whose measures are known."""

import numpy as np
import pytest
import torch
from records import made

from unimoe_model.evaluation.specialisation import (
    expert_entropy,
    mutual_information,
    top_experts,
)
from unimoe_model.study import measures
from unimoe_model.study.measures import KINDS, check_measure


def test_steps_to_loss():
    losses = [4.0] * 10 + [1.0] * 10
    runs = {"a": made(losses=losses)}
    assert measures.steps_to_loss(runs, "a", 4.0, 5) == 5
    assert measures.steps_to_loss(runs, "a", 1.0, 5) == 15
    assert measures.steps_to_loss(runs, "a", 2.5, 2) == 11
    assert measures.steps_to_loss(runs, "a", 0.5, 5) == 21
    with pytest.raises(ValueError, match=r"window \(30\) must be at most"):
        measures.steps_to_loss(runs, "a", 1.0, 30)


def test_final_loss():
    assert measures.final_loss({"a": made(losses=[9.0, 2.0, 4.0])}, "a", 2) == 3.0


def test_spread_is_that_of_the_noise_whatever_the_slope():
    noise = 0.1 * np.random.default_rng(0).normal(size=4000)
    for slope in (0.0, -0.01, 1.0):
        losses = 50 + slope * np.arange(4000) + noise
        found = measures.loss_spread({"a": made(losses=losses)}, "a", 20)
        assert found == pytest.approx(0.1, rel=0.05)
    assert measures.loss_spread({"a": made(losses=np.arange(60.0))}, "a", 20) < 1e-12


def test_spread_of_the_last_steps():
    quiet = 0.01 * np.random.default_rng(0).normal(size=200)
    losses = [*(10 * np.random.default_rng(1).normal(size=200)), *quiet]
    assert measures.loss_spread({"a": made(losses=losses)}, "a", 10, last=150) < 0.02


def test_accuracy_counts_tasks_the_same():
    runs = {"a": made(accuracy={"x": 0.2, "y": 0.6})}
    assert measures.accuracy(runs, "a") == pytest.approx(0.4)
    assert measures.accuracy(runs, "a", ["y"]) == 0.6


def test_accuracy_drop():
    runs = {
        "mixed": made(accuracy={"x": 0.5, "y": 0.6}),
        "x-alone": made(accuracy={"x": 0.9}),
        "y-alone": made(accuracy={"y": 0.5}),
    }
    alone = {"x": "x-alone", "y": "y-alone"}
    assert measures.accuracy_drop(runs, "mixed", alone) == pytest.approx((0.4 - 0.1) / 2)


def test_mutual_information():
    apart = {"text": [10, 0], "image": [0, 40]}
    runs = {"a": made(taken=apart), "b": made(taken={"text": [3, 1], "image": [75, 25]})}
    assert measures.routing_information(runs, "a") == pytest.approx(1.0)
    assert measures.routing_information(runs, "b") == pytest.approx(0.0, abs=1e-12)
    assert measures.routing_entropy(runs, "b") == pytest.approx(0.8112781)
    with pytest.raises(ValueError, match="arm c has no routing"):
        measures.routing_information({"c": made()}, "c")


def test_mutual_information_against_the_sum_over_pairs():
    """Of `p(m, e) log p(m, e) / (p(m) p(e))`, by layer; a modality without rows is left out."""
    taken = torch.tensor([[[5, 1, 2], [1, 1, 1]], [[0, 4, 4], [2, 0, 9]]])
    named = {"text": taken[0], "audio": taken[1], "video": torch.zeros(2, 3, dtype=torch.int64)}
    found = mutual_information(named)
    for layer in range(2):
        joint = taken[:, layer].double()
        joint = joint / joint.sum(1, keepdim=True) / 2
        outer = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        kept = joint > 0
        expected = (joint[kept] * (joint[kept] / outer[kept]).log2()).sum()
        assert found[layer].item() == pytest.approx(expected.item())
    assert top_experts(named) == {"text": [0, 0], "audio": [1, 2]}
    assert expert_entropy({"text": torch.tensor([[1, 1, 1, 1]])}).item() == pytest.approx(2.0)
    with pytest.raises(ValueError, match="at least one modality"):
        mutual_information({"text": torch.zeros(1, 2)})


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("speed", {}, r"at\.kind \('speed'\) must be one of steps_to_loss"),
        ("steps_to_loss", {}, r"at\.loss is missing"),
        ("final_loss", {"loss": 1.0}, r"at\.loss is an unknown option of final_loss"),
        ("final_loss", {"window": "9"}, r"at\.window \('9'\) must be of type"),
        ("loss_spread", {"window": 2}, r"at\.window \(2\) must be at least 3"),
        ("accuracy_drop", {"alone": {"x": "b"}}, r"at\.alone \(b\) must be among the arms: a"),
    ],
)
def test_refusals(kind, options, message):
    with pytest.raises(ValueError, match=message):
        check_measure(kind, options, ["a"], "at")


def test_every_kind_is_computed_or_refused():
    runs = {"a": made(accuracy={"x": 0.5}, taken={"text": [1, 1]})}
    options = {"steps_to_loss": {"loss": 1.0}, "accuracy_drop": {"alone": {"x": "a"}}}
    for name, kind in KINDS.items():
        assert np.isfinite(kind.compute(runs, "a", **options.get(name, {})))
