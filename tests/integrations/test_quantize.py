"""Models whose experts are quantised, beside the same models with the dequantised weights."""

import copy
import json
import subprocess
import sys
import weakref

import pytest
import torch
import transformers
from families import FAMILIES, experts_of, tiny_model
from tiny_causal import tiny_causal
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from unimoe_kernels import (
    GroupedExperts,
    MoE,
    QuantizedExperts,
    add_expert_lora,
    dequantize_weight,
    load_expert_lora,
    load_quantized,
    merge_expert_lora,
    quantize_experts,
    save_expert_lora,
    upcycle,
)
from unimoe_kernels.layers import quantized_experts
from unimoe_kernels.layers.quantized_projection import QuantizedProjection
from unimoe_kernels.testing import relative_error

WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))


def build(kind="Mixtral", **options):
    return tiny_causal(kind, SIZES, **options)


def mixtral():
    return build(num_local_experts=4, num_experts_per_tok=2)


def upcycled():
    return upcycle(build("Llama"), num_experts=4)


def logits_of(model, ids=IDS):
    codec = getattr(model, "codec_embedding", None)
    inputs = {"input_ids": ids} if codec is None else {"inputs_embeds": codec(ids)}
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if hasattr(out, "logits") else out[0]


def dequantize(model):
    """Puts the numbers of quantised projections back as parameters, in the layout of the model."""
    for experts in list(model.modules()):
        for name, part in list(experts.named_children()):
            if isinstance(part, QuantizedProjection):
                weight = dequantize_weight(part.weight, torch.float32)
                weight = weight.transpose(1, 2) if getattr(experts, "is_transposed", 0) else weight
                delattr(experts, name)
                weight = nn.Parameter(weight.contiguous(), requires_grad=False)
                experts.register_parameter(name, weight)
                experts._forward_pre_hooks.clear()
                if isinstance(experts, QuantizedExperts):
                    experts.__class__ = GroupedExperts
    return model


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_family_gives_what_its_dequantized_eager_form_gives(family, format):
    model = tiny_model(family, **WIDTHS)
    before = logits_of(model)
    widths = {p.shape[-1] for m in model.modules() for p in _stacked(m)}
    if any(width % 32 for width in widths):
        pytest.skip(f"experts of {family} are {widths} wide")
    quantize_experts(model, format, 32)
    assert not _stacked(experts_of(model, family))
    actual = logits_of(model)
    exact = dequantize(copy.deepcopy(model))
    exact.set_experts_implementation("eager")
    expected = logits_of(exact)
    assert relative_error(actual, expected.double()) < 1e-4
    assert relative_error(actual, before.double()) > 1e-4


def _stacked(experts):
    has_gate = hasattr(experts, "has_gate")
    return [p for p in experts.parameters(recurse=False) if p.dim() == 3] if has_gate else []


@pytest.mark.parametrize("make", [mixtral, upcycled])
@pytest.mark.parametrize(
    "options",
    [
        {"format": "int8"},
        {"format": "int4", "group_size": 32},
        {"format": "int4", "group_size": 32, "zero_points": True},
    ],
    ids=str,
)
def test_a_saved_model_comes_back(make, options, tmp_path):
    model = quantize_experts(make(), **options)
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    loaded = load_quantized(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(logits_of(loaded), expected)
    state, other = loaded.state_dict(), model.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())
    # Once more, and in bfloat16.
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(load_quantized(tmp_path / "again")), expected)
    narrow = load_quantized(tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in narrow.state_dict().values() if tensor.dim() == 3} <= {
        torch.bfloat16,
        torch.int8,
        torch.uint8,
    }
    # A token may go to another expert.
    assert (logits_of(narrow) - expected).norm() < 0.1 * expected.norm()
    generated = loaded.generate(IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, model.generate(IDS, max_new_tokens=3, do_sample=False))


def test_loading_never_makes_float_experts(tmp_path):
    quantize_experts(mixtral(), "int4", 32).save_pretrained(tmp_path)
    least = 4 * 64 * 32
    made = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            is_float = isinstance(result, torch.Tensor) and result.is_floating_point()
            if is_float and result.device.type != "meta" and result.numel() >= least:
                made.append(function)
            return result

    with Record():
        load_quantized(tmp_path)
        assert not made
        mixtral()
    assert made


def test_a_broken_folder_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    quantize_experts(mixtral(), "int4", 32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantization config"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    missing = next(name for name in state if name.endswith("down_proj.scales"))
    save_file({k: v for k, v in state.items() if k != missing}, path, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=rf"(?s)does not fit its config: .*{missing}"):
        load_quantized(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="holds no safetensors file"):
        load_quantized(tmp_path)
    mixtral().save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="holds no model with quantised experts"):
        load_quantized(tmp_path / "float")


def test_float_weights_go_one_after_the_other(monkeypatch):
    model = mixtral()
    names = [name for name, p in model.named_parameters() if p.dim() == 3]
    alive = [weakref.ref(model.get_parameter(name)) for name in names]
    counts, quantize = [], quantized_experts.quantize_weight

    def counting(*args, **options):
        counts.append(sum(one() is not None for one in alive))
        return quantize(*args, **options)

    monkeypatch.setattr(quantized_experts, "quantize_weight", counting)
    quantize_experts(model, "int4", 32)
    assert counts == [4, 3, 2, 1]
    assert not any(one() is not None for one in alive)


def test_bad_models_are_left_as_they_are():
    model = mixtral()
    before = copy.deepcopy(model.state_dict())
    last = model.model.layers[1].mlp.experts
    for break_it, kind, message in [
        (lambda: None, ValueError, r"format \('fp4'\) must be one of int8, int4"),
        (lambda: None, ValueError, r"experts.down_proj has rows of 32 .* group_size \(64\)"),
        (lambda: last.down_proj.data[3].fill_(torch.nan), ValueError, "down_proj holds NaN in exp"),
    ]:
        break_it()
        options = ("fp4", 32) if "fp4" in message else ("int4", 64 if "rows" in message else 32)
        with pytest.raises(kind, match=message):
            quantize_experts(model, *options)
        assert not any(isinstance(m, QuantizedProjection) for m in model.modules())
        assert not hasattr(model.config, "quantization_config")
    state = model.state_dict()
    assert all(torch.equal(before[k], state[k]) for k in state if "layers.1" not in k)
    with pytest.raises(ValueError, match="has no experts with stacked weights"):
        quantize_experts(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model \(str\) must be a torch.nn.Module"):
        quantize_experts("runs/model")
    model = quantize_experts(mixtral(), "int4", 32)
    with pytest.raises(RuntimeError, match=r"layers.0.mlp.experts is quantised already \(int4\)"):
        quantize_experts(model, "int8")
    model.set_experts_implementation("eager")
    with pytest.raises(RuntimeError, match="with quantised experts it must be 'unimoe'"):
        model(IDS)

    class Own(GroupedExperts):
        pass

    with pytest.raises(TypeError, match=r"experts \(Own\) must be GroupedExperts"):
        quantize_experts(Own(2, 32, 32))
    merged = add_expert_lora(MoE(32, 32, 4, 2), 2)
    merge_expert_lora(merged)
    with pytest.raises(RuntimeError, match="expert_lora is merged"):
        quantize_experts(merged, "int8")


@pytest.mark.parametrize("make", [mixtral, upcycled])
def test_lora_of_experts_trains_on_top_and_is_saved(make, tmp_path):
    model = add_expert_lora(quantize_experts(make(), "int4", 32), 2)
    exact = dequantize(copy.deepcopy(model))
    grads = []
    for one in (model, exact):
        with torch.no_grad():
            generator = torch.Generator().manual_seed(2)
            for name, parameter in one.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3, generator=generator)
        one(IDS, labels=IDS).loss.backward()
        grads.append({k: p.grad for k, p in one.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all("lora" in name for name in grads[0])
    for name, grad in grads[0].items():
        assert grad.abs().max() > 1e-6
        assert relative_error(grad, grads[1][name].double()) < 1e-4
    save_expert_lora(model, tmp_path)
    fresh = load_expert_lora(quantize_experts(make(), "int4", 32), tmp_path)
    assert torch.equal(logits_of(fresh), logits_of(model))
    with pytest.raises(RuntimeError, match="LoRA cannot be merged into it"):
        merge_expert_lora(model)


def test_transformers_alone_refuses_the_folder(tmp_path):
    """In a process without this package: it would draw the experts anew otherwise."""
    quantize_experts(mixtral(), "int8").save_pretrained(tmp_path)
    script = "import sys, transformers as t; t.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "ValueError" in result.stderr
    assert "quantization config" in result.stderr


def test_the_record_is_json(tmp_path):
    quantize_experts(mixtral(), "int4", 32, zero_points=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == {
        "quantized_by": "unimoe",
        "format": "int4",
        "group_size": 32,
        "zero_points": True,
    }
