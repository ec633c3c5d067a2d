"""LoRA on experts of whole models, beside peft's own route through `target_parameters`."""

import json

import peft
import pytest
import torch
from lora_models import CONFIGS, IDS, TARGETS, build, fill, logits_of
from torch import nn

from unimoe_kernels import (
    add_expert_lora,
    load_expert_lora,
    merge_expert_lora,
    save_expert_lora,
    unmerge_expert_lora,
)
from unimoe_kernels.testing import relative_error


@pytest.mark.parametrize("name", CONFIGS)
def test_starts_as_nothing_trains_and_merges(name):
    model = build(name)
    plain, weights = logits_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    assert add_expert_lora(model, r=3, alpha=6) is model
    assert relative_error(logits_of(model), plain) < 1e-5
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 2 * 2
    assert all("expert_lora" in key for key in trainable)
    fill(model)
    tuned = logits_of(model)
    assert relative_error(tuned, plain) > 1e-2
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().max() > 1e-6 for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    merge_expert_lora(model)
    assert relative_error(logits_of(model), tuned) < 1e-5
    with pytest.raises(RuntimeError, match="is already merged"):
        merge_expert_lora(model)
    unmerge_expert_lora(model)
    assert relative_error(logits_of(model), tuned) < 1e-5
    for key, weight in weights.items():
        assert relative_error(model.state_dict()[key], weight) < 1e-5, key
    with pytest.raises(RuntimeError, match="is not merged"):
        unmerge_expert_lora(model)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("target", [TARGETS, ("gate_up_proj",), ("down_proj",)], ids=len)
def test_peft_loads_what_we_save(tmp_path, name, target):
    model = add_expert_lora(build(name), r=3, alpha=6, target=target)
    fill(model)
    save_expert_lora(model, tmp_path)
    weights, config = (tmp_path / f"adapter_{n}" for n in ("model.safetensors", "config.json"))
    assert weights.stat().st_mode == config.stat().st_mode  # as the umask says
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path)
    assert relative_error(logits_of(theirs), logits_of(model)) < 1e-5
    again = load_expert_lora(build(name), tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_what_peft_saves_and_train_alike(tmp_path, name, rslora):
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=[],
        target_parameters=[f"experts.{key}" for key in TARGETS],
        use_rslora=rslora,
    )
    theirs = peft.get_peft_model(build(name), config).eval()
    fill(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_expert_lora(build(name), tmp_path)
    assert relative_error(logits_of(ours), logits_of(build(name))) > 1e-2
    assert relative_error(logits_of(ours), logits_of(theirs)) < 1e-5
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for experts, wrapper in zip(
        (m for m in ours.modules() if getattr(m, "expert_lora", None) is not None),
        (m for n, m in theirs.named_modules() if n.endswith("experts")),
        strict=True,
    ):
        E = 4
        for module in (wrapper, wrapper.base_layer):
            lora = experts.expert_lora[module.parameter_name]
            grad_A = module.lora_A["default"].weight.grad.view(E, 3, -1)
            grad_B = module.lora_B["default"].weight.grad.unflatten(1, (3, E)).permute(2, 0, 1)
            assert relative_error(lora.lora_A.grad, grad_A) < 1e-4
            assert relative_error(lora.lora_B.grad, grad_B) < 1e-4


@pytest.mark.parametrize("name", ["mixtral", "upcycled"])
def test_halves_of_the_gate_have_adapters_of_their_own(tmp_path, name):
    model = add_expert_lora(build(name), 2, 5, target=("gate_proj", "up_proj", "down_proj"))
    fill(model)
    tuned = logits_of(model)
    save_expert_lora(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path)
    assert relative_error(logits_of(theirs), tuned) < 1e-5
    merge_expert_lora(model)
    assert relative_error(logits_of(model), tuned) < 1e-5
    one = add_expert_lora(build(name), 2, 5, target=("up_proj",))
    fill(one)
    assert relative_error(logits_of(one), logits_of(build(name))) > 1e-3


def test_dropout_is_for_training_alone():
    model = add_expert_lora(build("mixtral"), 3, dropout=0.5)
    fill(model)
    plain = add_expert_lora(build("mixtral"), 3)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(model), logits_of(plain))
    model.train()
    assert relative_error(logits_of(model), logits_of(plain)) > 1e-3


def test_other_implementations_are_refused():
    model = add_expert_lora(build("mixtral"), 3)
    model.set_experts_implementation("eager")
    with pytest.raises(RuntimeError, match="experts_implementation is 'eager'"):
        logits_of(model)
    model.set_experts_implementation("unimoe")
    tuned = logits_of(merge_expert_lora(model))
    model.set_experts_implementation("eager")
    assert relative_error(logits_of(model), tuned) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"r \(0\) must be at least 1"),
        ({"r": 2, "dropout": 1.0}, r"dropout \(1.0\) must be at least 0 and below 1"),
        ({"r": 2, "target": ()}, r"target \(\(\)\) must be some of"),
        ({"r": 2, "target": ("q_proj",)}, r"target \(\('q_proj',\)\) must be some of"),
        ({"r": 2, "target": ("gate_up_proj", "up_proj")}, "or its halves, not both"),
    ],
)
def test_wrong_options_change_nothing(options, message):
    model = build("mixtral")
    with pytest.raises(ValueError, match=message):
        add_expert_lora(model, **options)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_models_and_adapters_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model \(Linear\) has no experts"):
        add_expert_lora(nn.Linear(2, 2), 2)
    with pytest.raises(ValueError, match="must not split the gate of"):
        add_expert_lora(build("gpt_oss"), 2, target=("gate_proj",))
    with pytest.raises(RuntimeError, match="has no expert LoRA"):
        save_expert_lora(build("mixtral"), tmp_path)
    model = add_expert_lora(build("mixtral"), 2)
    with pytest.raises(RuntimeError, match="already has LoRA"):
        add_expert_lora(model, 2)
    save_expert_lora(model, tmp_path)
    with pytest.raises(ValueError, match=r"4 experts with|has no LoRA for these experts"):
        load_expert_lora(build("qwen3_moe"), tmp_path)
    with pytest.raises(FileNotFoundError):
        load_expert_lora(build("mixtral"), tmp_path / "nowhere")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for changed, message in (
        ({"use_dora": True}, "peft_type must be LORA without DoRA"),
        ({"peft_type": "IA3"}, "peft_type must be LORA"),
        ({"bias": "all"}, r"bias \('all'\) must be 'none'"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | changed))
        with pytest.raises(ValueError, match=message):
            load_expert_lora(build("mixtral"), tmp_path)


def test_adapters_of_different_ranks_are_not_saved_as_one(tmp_path):
    model = add_expert_lora(build("mixtral"), 2)
    experts = next(m for m in model.modules() if getattr(m, "expert_lora", None) is not None)
    down = experts.expert_lora["down_proj"]
    down.lora_A = nn.Parameter(torch.cat((down.lora_A, down.lora_A), dim=1))
    down.lora_B = nn.Parameter(torch.cat((down.lora_B, down.lora_B), dim=2))
    with pytest.raises(ValueError, match=r"LoRA of ranks \[2, 4\]"):
        save_expert_lora(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
