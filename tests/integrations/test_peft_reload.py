"""Adapters with expert LoRA that peft's model loads again, as `Trainer` does when it resumes."""

import peft
import pytest
import torch
import transformers
from lora_models import IDS, build, fill, logits_of

from unimoe_kernels import add_expert_lora, merge_expert_lora, train_expert_lora
from unimoe_kernels.testing import relative_error

TARGETS = [
    ("gate_up_proj", "down_proj"),
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_proj",),
    ("up_proj", "down_proj"),
    ("down_proj",),
]


def with_both(target=TARGETS[0], r=3, alpha=6, name="mixtral", filled=True):
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=5, lora_alpha=7)
    model = add_expert_lora(peft.get_peft_model(build(name), config), r, alpha, target=target)
    if filled:
        fill(model)
    return model.eval()


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "target"),
    [("mixtral", target) for target in TARGETS]
    + [("upcycled", target) for target in TARGETS[:2]]
    + [("gpt_oss", TARGETS[0])],  # its gate is not in halves
)
def test_loading_again_restores_the_lora_of_experts(tmp_path, name, target):
    source, model = with_both(target, name=name), with_both(target, name=name, filled=False)
    expected = state_of(source)
    source.save_pretrained(tmp_path)
    assert relative_error(logits_of(model), logits_of(source)) > 1e-2
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits_of(model), logits_of(source))
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert any("expert_lora" in key for key, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"r": 4, "alpha": 8}, r"'down_proj': \(4, 2.0\)\}\) must be .*'down_proj': \(3, 2.0\)"),
        ({"alpha": 9}, r"'down_proj': \(3, 3.0\)\}\) must be .*'down_proj': \(3, 2.0\)"),
        ({"target": ("down_proj",)}, r"mlp.experts: targets .* must be"),
        ({"target": TARGETS[1]}, r"'gate_up_proj': \(6, 2.0\).* must be .*\(3, 2.0\)"),
    ],
)
def test_another_adapter_changes_nothing(tmp_path, saved, message):
    with_both(**saved).save_pretrained(tmp_path)
    model = with_both(filled=False)
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_gate_that_is_not_in_halves_is_not_cut_into_them(tmp_path):
    with_both(r=6, alpha=12).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gate and up must have separate LoRA"):
        with_both(TARGETS[1]).load_adapter(tmp_path, "default")


def test_merged_lora_is_not_replaced(tmp_path):
    with_both().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="is merged: unmerge it"):
        merge_expert_lora(with_both()).load_adapter(tmp_path, "default")


@pytest.mark.parametrize("order", ["peft first", "peft last"])
def test_a_trainer_goes_on_with_the_adapter_of_its_checkpoint(tmp_path, order):
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]

    def trainer():
        config = peft.LoraConfig(target_modules=["q_proj"], r=2)
        torch.manual_seed(0)
        if order == "peft first":
            model = add_expert_lora(peft.get_peft_model(build("mixtral"), config), r=3)
        else:
            model = peft.get_peft_model(add_expert_lora(build("mixtral"), r=3), config)
            train_expert_lora(model)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=4,
            save_steps=2,
            learning_rate=1e-2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        return transformers.Trainer(model=model, args=arguments, train_dataset=rows)

    whole = trainer()
    start = logits_of(whole.model)
    whole.train()
    assert relative_error(logits_of(whole.model), start) > 1e-2
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert relative_error(logits_of(again.model), logits_of(whole.model)) < 1e-6
