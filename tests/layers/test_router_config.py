"""Options of a router: what is refused, and how they reach MoE and TopKRouter."""

import dataclasses
import inspect
import typing

import pytest
import torch

from unimoe_kernels import MoE, RouterConfig, TopKRouter
from unimoe_kernels.layers.router_config import RouterOptions

D, F, E, K = 6, 10, 4, 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.0}, r"top_p \(0.0\) must be above 0 and at most 1"),
        ({"top_p": 0.5, "mode": "sigmoid"}, r"mode \('sigmoid'\) must be one with a softmax"),
        ({"capacity_factor": 0.0}, r"capacity_factor \(0.0\) must be above 0"),
        ({"min_capacity": -1}, r"min_capacity \(-1\) must be at least 0"),
        ({"num_null_experts": -1}, r"num_null_experts \(-1\) must be at least 0"),
        ({"num_shared_experts": -1}, r"num_shared_experts \(-1\) must be at least 0"),
        ({"shared_scores": "half"}, r"shared_scores \('half'\) must be one of"),
        ({"jitter": -0.1}, r"jitter \(-0.1\) must be at least 0"),
        ({"router_dtype": "int32"}, r"router_dtype \(int32\) must be a floating point dtype"),
        (
            {"mode": "sparsemixer", "correction_bias": True},
            r"correction_bias is not supported with mode='sparsemixer'",
        ),
        ({"mode": "softmix"}, r"mode \('softmix'\) must be one of"),
        ({"top_k": 6, "num_null_experts": 1}, r"top_k \(6\) must be at most num_experts \(5\)"),
    ],
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        MoE(D, F, E, **{"top_k": K, **options})


@pytest.mark.parametrize(
    "layer", [lambda **o: MoE(D, F, E, K, **o), lambda **o: TopKRouter(D, E, K, **o)]
)
def test_unknown_option_is_refused(layer):
    with pytest.raises(TypeError, match="has no option 'capcity_factor'; did you mean 'capacity_f"):
        layer(capcity_factor=1.0)
    with pytest.raises(TypeError, match=r"router_config \(dict\) must be a RouterConfig"):
        layer(router_config={"top_p": 0.5})


def test_config_and_options_make_the_same_router(randn):
    config = RouterConfig(mode="softmax_topk", top_p=0.4, scale=2.0)
    given = MoE(D, F, E, K, router_config=config, scale=3.0)
    spelled = MoE(D, F, E, K, mode="softmax_topk", top_p=0.4, scale=3.0)
    assert given.router.config == spelled.router.config
    assert config.scale == 2.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.scale = 3.0
    spelled.load_state_dict(given.state_dict())
    x = randn(5, D)
    assert torch.equal(given(x), spelled(x))


@pytest.mark.parametrize("layer", [MoE, TopKRouter])
def test_every_option_is_in_the_signature_and_typed(layer):
    fields = {field.name: field for field in dataclasses.fields(RouterConfig)}
    assert typing.get_type_hints(RouterOptions).keys() == fields.keys()
    hints = typing.get_type_hints(RouterConfig)
    assert typing.get_type_hints(RouterOptions) == {name: hints[name] for name in fields}
    shown = inspect.signature(layer).parameters
    for name, field in fields.items():
        assert shown[name].default == field.default, name
        assert name in RouterConfig.__doc__


def test_options_of_the_router_are_in_its_config():
    router = TopKRouter(D, E, K, top_p=0.5)
    with pytest.warns(DeprecationWarning, match=r"use TopKRouter.config.top_p"):
        assert router.top_p == 0.5
    with pytest.warns(DeprecationWarning, match=r"use TopKRouter.config = ") as warned:
        router.top_p = 0.25
    assert warned[0].filename == __file__
    assert router.config.top_p == 0.25
