"""Learning rates and optimisers of a stage."""

import pytest
import torch

from unimoe_model.training.optimization import Optimization, build_optimizers

SETTINGS = Optimization(steps=6, batch_size=2, learning_rate=1e-2, muon_learning_rate=1e-2)


@pytest.mark.parametrize(
    ("schedule", "final"), [("cosine", 0.1), ("linear", 0.0), ("constant", 1.0)]
)
def test_schedules_end_where_they_say(schedule, final):
    settings = Optimization(100, 1, 1.0, schedule=schedule, final_rate=final, warmup=0.1)
    factors = [settings.learning_rate_factor(step) for step in range(10, 100)]
    assert factors == sorted(factors, reverse=True)
    assert factors[0] == 1
    assert factors[-1] == pytest.approx(final, abs=0.02)


def test_learning_rate_warms_up_and_decays_to_a_tenth():
    settings = Optimization(steps=100, batch_size=1, learning_rate=1.0, warmup=0.1)
    factors = [settings.learning_rate_factor(step) for step in range(100)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[10] == pytest.approx(1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0.1, abs=0.001)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, r"steps \(0\) must be at least 1"),
        ({"batch_size": -1}, r"batch_size \(-1\)"),
        ({"learning_rate": 0.0}, r"learning_rate \(0.0\) must be positive"),
    ],
)
def test_optimizer_settings_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        Optimization(**{"steps": 1, "batch_size": 1, "learning_rate": 1.0, **fields})


def test_muon_takes_the_matrices_of_the_decoder_layers(tiny_model):
    model = tiny_model()
    parameters = dict(model.named_parameters())
    adam, muon = build_optimizers(parameters, SETTINGS)
    names = {id(p): n for n, p in parameters.items()}
    taken = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in taken
    layers = "model.language_model.layers."
    assert taken == {n for n, p in parameters.items() if n.startswith(layers) and p.dim() == 2}
    assert any(".layers." in n for n in parameters.keys() - taken if parameters[n].dim() == 2)
    rest = {names[id(p)] for p in adam.param_groups[0]["params"]}
    assert taken | rest == parameters.keys()
    assert not taken & rest
    (only,) = build_optimizers(parameters, Optimization(1, 1, 1.0))
    assert isinstance(only, torch.optim.AdamW)
