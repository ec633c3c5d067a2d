"""Whole models with quantised experts: compiled, decoding with a static cache, pickled."""

import pickle

import pytest
import torch
import transformers
from test_quantize import IDS, logits_of, mixtral, upcycled

from unimoe_kernels import quantize_experts

FORMATS = [("int8", None), ("int4", 32)]


@pytest.mark.parametrize("options", FORMATS, ids=str)
@pytest.mark.parametrize("make", [mixtral, upcycled])
def test_a_compiled_step_with_a_static_cache_gives_the_tokens_of_a_plain_one(make, options):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = quantize_experts(make(), *options).eval()
    config = transformers.CompileConfig(
        fullgraph=True, dynamic=False, backend="aot_eager", mode=None
    )
    config._compile_all_devices = True
    lengths = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    expected = model.generate(IDS, **lengths)
    compiled = model.generate(IDS, **lengths, cache_implementation="static", compile_config=config)
    assert compiled.tolist() == expected.tolist()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_a_pickled_model_computes_the_same(options):
    model = quantize_experts(mixtral(), *options)
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits_of(other), logits_of(model))
    other.set_experts_implementation("eager")
    with pytest.raises(RuntimeError, match="with quantised experts it must be 'unimoe'"):
        logits_of(other)


def test_names_in_the_state_dict_and_the_meta_device():
    parts = ("scales", "values", "zeros")
    model = quantize_experts(mixtral(), "int4", 32, zero_points=True)
    prefix = "model.layers.0.mlp.experts."
    names = [name for name in model.state_dict() if name.startswith(prefix)]
    expected = [f"{prefix}{key}.{part}" for key in ("down_proj", "gate_up_proj") for part in parts]
    assert sorted(names) == expected
    with torch.device("meta"):
        empty = quantize_experts(mixtral(), "int4", 32, zero_points=True)
    shapes = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
    assert {name: (t.shape, t.dtype) for name, t in empty.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
