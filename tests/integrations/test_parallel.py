"""Parallel plans of transformers, and FSDP2, over our experts: two processes beside one."""

from pathlib import Path

import launcher
import pytest
import torch
import transformers

RANKS = Path(__file__).with_name("ranks.py")


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    distributed = pytest.importorskip("transformers.distributed")
    if not hasattr(distributed.DistributedConfig, "efsdp_size"):
        pytest.skip(f"transformers {transformers.__version__} has no such plans")
    folder = tmp_path_factory.mktemp("ranks")
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return launcher.found(RANKS, 2, folder)


@pytest.mark.parametrize(
    "layout",
    [
        "tensor",
        "tensor and expert, all-to-all",
        "tensor and expert, all-reduce",
        "FSDP",
        "FSDP and expert",
    ],
)
def test_plans_of_transformers(errors, layout):
    assert 0 < errors[layout] < 1e-5


def test_moe_under_fsdp2(errors):
    assert 0 <= errors["MoE under FSDP2"] < 1e-12


@pytest.mark.parametrize("layer", ["dense", "MoE", "injected loss", "looped"])
def test_a_host_may_change_the_output_of_a_sharded_layer_in_place(errors, layer):
    assert 0 <= errors["changed in place"][layer] < 1e-12
