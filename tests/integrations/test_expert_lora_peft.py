"""Expert LoRA beside peft's LoRA on linear layers, in wrapped models, and in adapter folders."""

import json
import warnings

import peft
import pytest
import torch
from lora_models import IDS, SIZES, build, fill, logits_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from unimoe_kernels import (
    add_expert_lora,
    load_expert_lora,
    merge_and_unload_expert_lora,
    save_expert_lora,
    train_expert_lora,
)
from unimoe_kernels.testing import relative_error

NAMES = ["mixtral", "upcycled"]
ATTENTION = {"target_modules": ["q_proj", "v_proj"], "r": 5, "lora_alpha": 7}


def attention_lora(model, **options):
    return peft.get_peft_model(model, peft.LoraConfig(**(ATTENTION | options)))


def with_both(name, order, **options):
    """A model with LoRA on attention and experts, both of order one, put there in an order."""
    if order == "peft first":
        model = attention_lora(build(name), **options)
        add_expert_lora(model, r=3, alpha=6)
    else:
        model = attention_lora(add_expert_lora(build(name), r=3, alpha=6), **options)
        train_expert_lora(model)
    fill(model)
    return model.eval()


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", [*NAMES, "mixtral int4"])
@pytest.mark.parametrize("order", ["peft first", "peft last"])
def test_both_train(name, order):
    model = with_both(name, order)
    names = trained(model)
    assert sum("expert_lora" in key for key in names) == 2 * 2 * 2
    assert sum("self_attn" in key for key in names) == 2 * 2 * 2
    assert len(names) == 16
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.norm() > 0) == (key in names), key


def test_expert_lora_that_peft_froze_warns_and_names_the_call():
    model = attention_lora(add_expert_lora(build("mixtral"), r=3))
    fill(model)
    assert not any("expert_lora" in name for name in trained(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(input_ids=IDS)
    with pytest.warns(UserWarning, match=r"call train_expert_lora\(model\) to train it"):
        model.train()(input_ids=IDS)
    train_expert_lora(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=IDS)
    with pytest.raises(RuntimeError, match="has no expert LoRA"):
        train_expert_lora(build("mixtral"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rslora", [False, True])
def test_one_folder_holds_both(tmp_path, name, rslora):
    model = with_both(name, "peft first", use_rslora=rslora)
    expected = logits_of(model)
    assert relative_error(expected, logits_of(build(name))) > 1e-2
    save_expert_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 7)
    # Into a plain model; into one that peft has prepared; and by peft alone.
    plain = load_expert_lora(build(name), tmp_path).eval()
    assert relative_error(logits_of(plain), expected) < 1e-6
    assert len(trained(plain)) == 16
    prepared = attention_lora(build(name), use_rslora=rslora).eval()
    assert load_expert_lora(prepared, tmp_path) is prepared
    assert relative_error(logits_of(prepared), expected) < 1e-6
    assert len(trained(prepared)) == 16
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert relative_error(logits_of(theirs), expected) < 1e-5
    save_expert_lora(plain, tmp_path / "again")
    one, two = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("order", ["peft first", "peft last"])
def test_save_pretrained_of_peft_keeps_the_expert_lora(tmp_path, order):
    model = with_both("mixtral", order)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("mixtral"), tmp_path).eval()
    assert relative_error(logits_of(theirs), logits_of(model)) < 1e-5
    merge_and_unload_expert_lora(model)
    model.save_pretrained(tmp_path / "attention")
    keys = load_file(tmp_path / "attention" / "adapter_model.safetensors")
    assert not any("experts" in key for key in keys)


def test_adapters_that_peft_wrote_with_both(tmp_path):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={"experts.down_proj": 2},
        alpha_pattern={"self_attn.q_proj": 3},
    )
    theirs = peft.get_peft_model(build("mixtral"), config).eval()
    fill(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_expert_lora(build("mixtral"), tmp_path).eval()
    assert relative_error(logits_of(ours), logits_of(theirs)) < 1e-5


def test_patterns_of_peft_do_not_reach_the_experts(tmp_path):
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], alpha_pattern={"down_proj": 64}, rank_pattern={"_proj": 4}
    )
    model = peft.get_peft_model(build("mixtral"), config)
    fill(add_expert_lora(model, r=3, alpha=6).eval())
    save_expert_lora(model, tmp_path)
    again = load_expert_lora(build("mixtral"), tmp_path).eval()
    assert relative_error(logits_of(again), logits_of(model)) < 1e-5


@pytest.mark.parametrize("wrap", ["peft", "compiled", "parallel", "layers compiled"])
def test_names_are_those_of_the_innermost_model(tmp_path, wrap):
    model = add_expert_lora(build("mixtral"), r=3, alpha=6)
    fill(model)
    expected = logits_of(model)
    if wrap == "peft":
        wrapped = attention_lora(model)
    elif wrap == "compiled":
        wrapped = torch.compile(model, backend="eager")
    elif wrap == "parallel":
        wrapped = torch.nn.DataParallel(model)
    else:
        wrapped = model
        model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    save_expert_lora(wrapped, tmp_path)
    again = load_expert_lora(build("mixtral"), tmp_path).eval()
    assert relative_error(logits_of(again), expected) < 1e-5
    theirs = peft.PeftModel.from_pretrained(build("mixtral"), tmp_path)
    assert relative_error(logits_of(theirs), expected) < 1e-5
    other = torch.compile(build("mixtral"), backend="eager")
    load_expert_lora(other, tmp_path)
    assert relative_error(logits_of(other.eval()), expected) < 1e-5


def sized(experts=4, intermediate=32, hidden=32):
    sizes = SIZES | {"hidden_size": hidden}
    config = MixtralConfig(
        **sizes, intermediate_size=intermediate, num_local_experts=experts, num_experts_per_tok=2
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "sizes", [{"experts": 2}, {"experts": 4}, {"experts": 16}, {"intermediate": 24}, {"hidden": 64}]
)
def test_adapters_of_another_model_change_nothing(tmp_path, sizes):
    save_expert_lora(add_expert_lora(sized(8), r=4), tmp_path)
    model = sized(**({"experts": 8} | sizes))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"LoRA of model.layers.0.mlp.experts.\w+ \(A .* must be"):
        load_expert_lora(model, tmp_path)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    load_expert_lora(sized(8), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 2}, r"rank 2 of adapter_config.json"),
        ({"r": 8}, r"rank 8 of adapter_config.json"),
        ({"rank_pattern": {"down_proj": 2}}, r"rank 2 of adapter_config.json"),
    ],
)
def test_a_rank_that_the_weights_do_not_have_is_refused(tmp_path, change, message):
    save_expert_lora(add_expert_lora(build("mixtral"), r=4), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_expert_lora(build("mixtral"), tmp_path)


def test_what_does_not_fit_the_linear_layers_is_refused(tmp_path):
    save_expert_lora(with_both("mixtral", "peft first"), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    for changed, message in (
        ({f"{stem}A.weight": torch.zeros(5, 31)}, r"self_attn.q_proj \(A \[5, 31\]"),
        ({f"{stem}A.weight": torch.zeros(2, 32)}, "must fit a linear layer of this model with r"),
        ({"base_model.model.lm_head.weight": torch.zeros(40, 32)}, "has more than LoRA of these"),
        ({f"{stem}B.weight": None}, "B missing"),
    ):
        saved = {k: v for k, v in (tensors | changed).items() if v is not None}
        save_file(saved, path)
        model = build("mixtral")
        with pytest.raises(ValueError, match=message):
            load_expert_lora(model, tmp_path)
        assert not any("lora" in name for name, _ in model.named_parameters())
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"rank 5, scale 1.4\) must be that of peft \(rank 5"):
        load_expert_lora(attention_lora(build("mixtral"), lora_alpha=9), tmp_path)
    with pytest.raises(ValueError, match="but the model has peft's LoRA on"):
        load_expert_lora(attention_lora(build("mixtral"), target_modules=["k_proj"]), tmp_path)


def test_adapters_of_peft_that_are_not_plain_are_not_saved(tmp_path):
    model = attention_lora(build("mixtral"), use_dora=True)
    add_expert_lora(model, r=2)
    with pytest.raises(ValueError, match="LORA without DoRA"):
        save_expert_lora(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
