"""Weights and LoRA of experts in state dicts and saved models: never added up twice or left out."""

import copy
import pickle

import pytest
import torch
import transformers
from lora_models import IDS, build, fill, logits_of
from safetensors.torch import load_file, save_file

from unimoe_kernels import (
    MoE,
    add_expert_lora,
    merge_and_unload_expert_lora,
    merge_expert_lora,
    unmerge_expert_lora,
)
from unimoe_kernels.testing import relative_error

NAMES = ["mixtral", "upcycled"]


def with_lora(name, filled=True):
    model = add_expert_lora(build(name), r=3, alpha=6)
    if filled:
        fill(model)
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("into_merged", [False, True])
def test_a_state_dict_knows_whether_it_is_merged(name, merged, into_merged, tmp_path):
    source, target = with_lora(name), with_lora(name, filled=False)
    expected = logits_of(source)
    if merged:
        merge_expert_lora(source)
    if into_merged:
        merge_expert_lora(target)
    logits_of(target)
    save_file(dict(source.state_dict()), tmp_path / "state.safetensors")
    target.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert relative_error(logits_of(target), expected) < 1e-5
    (unmerge_expert_lora if merged else merge_expert_lora)(target)
    assert relative_error(logits_of(target), expected) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_states_without_the_buffer_are_not_merged(name):
    source, target = with_lora(name), merge_expert_lora(with_lora(name, filled=False))
    old = {key: value for key, value in source.state_dict().items() if "merged" not in key}
    assert len(old) < len(source.state_dict())
    target.load_state_dict(old)
    assert torch.equal(logits_of(target), logits_of(source))
    other = {key: value for key, value in old.items() if "experts" not in key}
    merged = merge_expert_lora(copy.deepcopy(source))
    expected = logits_of(merged)
    merged.load_state_dict(other, strict=False)
    assert torch.equal(logits_of(merged), expected)


def test_a_buffer_that_is_written_in_place_counts():
    """As loaders do that fill the tensors of a state dict."""
    source, target = merge_expert_lora(with_lora("upcycled")), with_lora("upcycled", filled=False)
    logits_of(target)
    state = target.state_dict()
    for key, value in source.state_dict().items():
        state[key].copy_(value)
    assert torch.equal(logits_of(target), logits_of(source))


@pytest.mark.parametrize("merge", [merge_expert_lora, merge_and_unload_expert_lora])
def test_a_folder_holds_no_adapter_beside_merged_weights(merge, tmp_path):
    model = with_lora("mixtral")
    expected = logits_of(model)
    load = transformers.MixtralForCausalLM.from_pretrained
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    merge(model).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter*"))
    assert relative_error(logits_of(load(tmp_path)), expected) < 1e-5
    # An adapter of others remains.
    for name, text in (("adapter_config.json", "{}"), ("adapter_model.safetensors", "")):
        (tmp_path / name).write_text(text)
    model.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("adapter*"))) == 2


def test_copies_and_casts_stay_merged():
    merged = merge_expert_lora(with_lora("mixtral"))
    expected = logits_of(merged)
    assert torch.equal(logits_of(copy.deepcopy(merged)), expected)
    assert torch.equal(logits_of(pickle.loads(pickle.dumps(merged))), expected)
    assert torch.equal(logits_of(merged.double().float()), expected)
    assert "expert_lora.merged" in next(key for key in merged.state_dict() if "merged" in key)


def test_compiled_forwards_follow_what_is_loaded():
    moe = MoE(8, 12, 4, 2, dtype=torch.float64)
    moe.experts.add_lora(2)
    with torch.no_grad():
        for lora in moe.experts.expert_lora.values():
            lora.lora_B.normal_()
    merged = merge_expert_lora(copy.deepcopy(moe))
    x = torch.randn(5, 8, dtype=torch.float64)
    expected = moe(x)
    fresh = MoE(8, 12, 4, 2, dtype=torch.float64)
    fresh.experts.add_lora(2)
    compiled = torch.compile(fresh, backend="aot_eager")
    for source in (merged, moe, merged):
        fresh.load_state_dict(source.state_dict())
        assert relative_error(compiled(x), expected) < 1e-12


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_saved_model_comes_back_with_its_lora(name, tmp_path):
    """By `from_pretrained` of transformers, which reads the adapter, and as a state to train on."""
    model = with_lora(name)
    expected = logits_of(model)
    assert relative_error(expected, logits_of(build(name))) > 1e-2
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    assert relative_error(logits_of(loaded), expected) < 1e-5
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.embed_tokens.weight.normal_()
    copied.save_pretrained(tmp_path / "copy")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "copy", attn_implementation="eager"
    )
    assert relative_error(logits_of(loaded), logits_of(copied)) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("before", [False, True])
def test_merge_and_unload_leaves_nothing_of_the_lora(name, before, tmp_path):
    model, plain = with_lora(name), build(name)
    tuned = logits_of(model)
    if before:
        merge_expert_lora(model)
    assert merge_and_unload_expert_lora(model) is model
    assert relative_error(logits_of(model), tuned) < 1e-5
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert not any("lora" in key for key in load_file(tmp_path / "model.safetensors"))
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not report["unexpected_keys"]
    assert relative_error(logits_of(loaded), tuned) < 1e-5
    fill(add_expert_lora(model, r=2))
    assert relative_error(logits_of(model), tuned) > 1e-3
    with pytest.raises(RuntimeError, match="has no expert LoRA"):
        merge_and_unload_expert_lora(plain)


def test_a_trainer_goes_on_from_its_checkpoint(tmp_path):
    """Of a family whose weights transformers saves by the names that they have in memory."""
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]

    def trainer(steps):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=steps,
            save_steps=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        return transformers.Trainer(model=with_lora("gpt_oss"), args=arguments, train_dataset=rows)

    whole = trainer(4)
    whole.train()
    again = trainer(4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert relative_error(logits_of(again.model), logits_of(whole.model)) < 1e-5
