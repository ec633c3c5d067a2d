"""Numbers of the published adapters, at tiny sizes; see `test_golden.py`."""

import pytest
import torch
from in_memory import to_published
from published import (
    Case,
    below,
)
from published_adapter import base_of_adapter, copy_adapter, write_router_adapter
from published_checks import (
    OUTPUT,
    check_forward,
    generate_row,
)

from unimoe_kernels.testing import relative_error
from unimoe_model.checkpoints.convert import convert_from_published
from unimoe_model.modeling import UniMoEForConditionalGeneration


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_adapter_is_merged(tmp_path, suffix):
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    case, whole = Case("lora_merge"), Case("end_to_end_speech")
    base, tokenizer, known = base_of_adapter(tmp_path / "base")
    adapter = copy_adapter(case, tmp_path / "adapter", suffix)
    convert_from_published(adapter, tmp_path / "ours", base, tokenizer, overrides=known)
    model = UniMoEForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    merged = to_published({k: v for k, v in model.state_dict().items() if "language" in k})
    expected = case.tensors("merged")
    assert expected.keys() - merged.keys() <= {k for k in expected if "mm_" in k or "query" in k}
    compared = [key for key in expected if key in merged]
    assert len(compared) > 10
    for key in compared:
        assert (merged[key] - expected[key]).abs().max() < 1e-6, key
    for key, stats in case.checks["merged_stats_of_other_layer_tensors"].items():
        assert abs(merged[key].double().square().sum() / stats["sq_sum"] - 1) < 1e-5, key
    io, merged_io = whole.tensors("forward"), case.tensors("io")
    io["logit_positions"] = merged_io["logit_positions"]
    loss, logits = merged_io["out.loss_merged"], merged_io["out.logits_merged_at_positions"]
    weights = whole.tensors("weights")
    check_forward(case, model, io, weights, "speech", loss, logits)
    expected = case.checks["generate_row0_new_ids"]
    generated = whole.tensors("generate")
    new, _ = generate_row(model, io, generated, 0, weights, "speech", len(expected))
    assert new == expected


def test_router_lora_is_not_lost(tmp_path):
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    case = Case("lora_merge")
    base, tokenizer, known = base_of_adapter(tmp_path / "base")
    adapter, variant = write_router_adapter(case, tmp_path / "adapter", base)
    convert_from_published(adapter, tmp_path / "ours", base, tokenizer, overrides=known)
    model = UniMoEForConditionalGeneration.from_pretrained(tmp_path / "ours")
    whole = below(variant, "loaded_without_gates_file.")
    lost = below(variant, "loaded_with_gates_file.")
    assert whole
    for index, moe in model.moe_layers():
        name = f"model.layers.{index}.mlp.gate.weight"
        # The published loader lets the file of gates overwrite the merged router.
        assert torch.equal(lost[name], variant[f"base.{name}"])
        assert relative_error(moe.router.weight, whole[name]) < OUTPUT
        assert relative_error(moe.router.weight, lost[name]) > 0.1
