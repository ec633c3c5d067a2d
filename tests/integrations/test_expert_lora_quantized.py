"""Expert LoRA on quantised experts, beside peft's LoRA and in adapter folders."""

import copy

import peft
import pytest
import torch
from lora_models import IDS, build, fill, logits_of

from unimoe_kernels import (
    add_expert_lora,
    load_expert_lora,
    merge_and_unload_expert_lora,
    quantize_experts,
    save_expert_lora,
)
from unimoe_kernels.testing import relative_error

NAMES = ["mixtral", "upcycled", "qwen3_moe", "gpt_oss"]


def quantised(name):
    return quantize_experts(build(name), "int8")


def with_attention_lora(model):
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=5))


@pytest.mark.parametrize("name", NAMES)
def test_one_folder_holds_it_and_the_attention_lora(name, tmp_path):
    model = add_expert_lora(with_attention_lora(quantised(name)), r=3, alpha=6)
    fill(model)
    expected = logits_of(model.eval())
    assert relative_error(expected, logits_of(quantised(name))) > 1e-2
    save_expert_lora(model, tmp_path)
    for fresh in (quantised(name), with_attention_lora(quantised(name))):
        assert torch.equal(logits_of(load_expert_lora(fresh, tmp_path).eval()), expected)
    # Trained on quantised weights, it also fits the float ones, and the other way round.
    on_floats = logits_of(load_expert_lora(build(name), tmp_path).eval())
    assert 1e-4 < relative_error(on_floats, expected) < 0.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", [("gate_up_proj",), ("up_proj", "down_proj")], ids=str)
def test_order_of_quantisation_and_lora_does_not_matter(name, target):
    if name == "gpt_oss" and "up_proj" in target:
        pytest.skip("interleaves gate and up")
    before = quantize_experts(add_expert_lora(build(name), 2, 5, target=target), "int8")
    after = add_expert_lora(quantised(name), 2, 5, target=target)
    results = []
    for model in (before, after):
        fill(model)
        model.zero_grad()
        output = model(input_ids=IDS, labels=IDS)
        output.loss.backward()
        trained = {n: p.grad for n, p in model.named_parameters() if "expert_lora" in n}
        results.append((output.logits, trained))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for key, grad in results[0][1].items():
        assert grad.abs().max() > 0
        assert torch.equal(grad, results[1][1][key]), key


def test_merging_is_refused_and_changes_nothing():
    model = add_expert_lora(quantised("mixtral"), 2)
    fill(model)
    expected, before = logits_of(model), copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="LoRA cannot be merged into it"):
        merge_and_unload_expert_lora(model)
    assert torch.equal(logits_of(model), expected)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())


def test_float_weights_that_peft_adapted_are_not_quantised():
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = peft.get_peft_model(
        build("mixtral"),
        peft.LoraConfig(target_modules=["q_proj"], target_parameters=targets),
    )
    fill(model)
    expected = logits_of(model)
    message = "layers.0.mlp.experts.down_proj has LoRA of peft's target_parameters"
    with pytest.raises(RuntimeError, match=message):
        quantize_experts(model, "int8")
    assert torch.equal(logits_of(model), expected)
