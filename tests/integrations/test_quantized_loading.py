"""Folders of floats that are quantised while they are read."""

import json
import os

import pytest
import torch
from lora_models import fill
from safetensors.torch import load_file, save_file
from test_quantize import build, logits_of, mixtral, upcycled

from unimoe_kernels import (
    add_expert_lora,
    load_and_quantize,
    load_expert_lora,
    load_quantized,
    quantize_experts,
    save_expert_lora,
)
from unimoe_kernels.integrations import quantized_loading
from unimoe_kernels.integrations.model_experts import with_lora


@pytest.mark.parametrize("make", [mixtral, upcycled])
@pytest.mark.parametrize(
    "options",
    [
        {"format": "int8"},
        {"format": "int4", "group_size": 32, "zero_points": True},
    ],
    ids=str,
)
def test_same_as_quantizing_the_loaded_model(make, options, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "float")
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    loaded = load_and_quantize(tmp_path / "float", **options)
    assert os.environ.get("HF_DEACTIVATE_ASYNC_LOAD") == before
    quantize_experts(model, **options)
    assert type(loaded) is type(model)
    types = [type(module) for module in model.modules()]
    assert [type(module) for module in loaded.modules()] == types
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert torch.equal(logits_of(loaded), logits_of(model))
    loaded.save_pretrained(tmp_path / "quantised")
    assert torch.equal(logits_of(load_quantized(tmp_path / "quantised")), logits_of(model))


def test_lora_on_it_is_that_of_any_quantised_model(tmp_path):
    mixtral().save_pretrained(tmp_path / "float")
    loaded = add_expert_lora(load_and_quantize(tmp_path / "float", "int8"), r=3)
    # transformers reads the weights of some models in alphabetical order.
    for _, experts in with_lora(loaded):
        parts = experts._modules
        for name in ("gate_up_proj", "expert_lora"):
            parts[name] = parts.pop(name)
    fill(loaded)
    save_expert_lora(loaded, tmp_path / "adapter")
    again = load_expert_lora(quantize_experts(mixtral(), "int8"), tmp_path / "adapter").eval()
    assert torch.equal(logits_of(again), logits_of(loaded.eval()))


def test_one_float_weight_exists_at_a_time(tmp_path, monkeypatch):
    """All others are on the meta device still, or quantised."""
    mixtral().save_pretrained(tmp_path)
    counts, kinds, quantize = [], [], quantized_loading.quantize_weight
    convert = quantized_loading._round_on_arrival
    experts_seen = []

    def noting(name, experts, options):
        experts_seen.append(experts)
        convert(name, experts, options)

    def counting(*args, **options):
        floats = [p for one in experts_seen for p in one.parameters() if p.dim() == 3]
        counts.append(sum(not p.is_meta for p in floats))
        kinds.append(len(floats))
        return quantize(*args, **options)

    monkeypatch.setattr(quantized_loading, "_round_on_arrival", noting)
    monkeypatch.setattr(quantized_loading, "quantize_weight", counting)
    load_and_quantize(tmp_path, "int4", 32)
    assert counts == [1, 1, 1, 1]
    assert kinds == [4, 3, 2, 1]


def test_bad_folders_are_refused(tmp_path):
    model = mixtral()
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"format \('fp4'\) must be one of"):
        load_and_quantize(tmp_path / "a", "fp4")
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.down_proj has rows of 32 "):
        load_and_quantize(tmp_path / "a", "int4", 64)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj holds NaN in expert 3"):
        load_and_quantize(tmp_path / "nan", "int4", 32)
    path = tmp_path / "a/model.safetensors"
    state = load_file(path)
    state = {name: tensor for name, tensor in state.items() if "lm_head" not in name}
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="must hold the weights of its config, such as lm_head"):
        load_and_quantize(tmp_path / "a", "int4", 32)
    dense = tmp_path / "dense"
    build("Llama").save_pretrained(dense)
    with pytest.raises(ValueError, match="has no experts with stacked weights"):
        load_and_quantize(dense, "int4", 32)
    quantize_experts(mixtral(), "int8").save_pretrained(tmp_path / "int8")
    with pytest.raises(ValueError, match="is quantised already"):
        load_and_quantize(tmp_path / "int8", "int8")
    assert json.loads((tmp_path / "int8/config.json").read_text())["quantization_config"]
