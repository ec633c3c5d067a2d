"""LoRA of experts whose weights lie on two ranks; `lora_ranks.py` is what they run."""

from pathlib import Path

import launcher
import pytest

RANKS = Path(__file__).with_name("lora_ranks.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return launcher.found(RANKS, 2, tmp_path_factory.mktemp("lora_ranks"))


@pytest.mark.parametrize(
    "case", ["mixtral, fully_shard", "layer, fully_shard", "layer, parallelize_moe"]
)
def test_the_adapter_is_that_of_one_process(found, case):
    assert found["files"][case] is True


def test_whole_weights_know_that_they_are_merged(found):
    error, merged = found["merged"]
    assert error < 1e-12
    assert merged


def test_halves_are_merged_into_weights_or_refused(found):
    (text, error, merged), (refusal, _, changed) = found["halves"]
    assert (text, merged) == ("no error", True)
    assert error < 1e-12
    assert "LoRA of gate_proj cannot be merged into gate_up_proj that is sharded" in refusal
    assert not changed


@pytest.mark.parametrize("kind", ["fully_shard", "parallelize_moe"])
def test_lora_comes_before_the_weights_are_sharded(found, kind):
    texts = found["refusals"]
    for what in ("add", "load"):
        assert (
            "moe.experts.gate_up_proj is sharded: LoRA of experts must be added or loaded"
            in (texts[f"{what} after {kind}"])
        )
    assert texts[f"unchanged by {kind}"] == "True"
    assert texts[f"layer after {kind}"].startswith("RuntimeError")


@pytest.mark.parametrize("kind", ["fully_shard", "parallelize_moe"])
@pytest.mark.parametrize("reader", ["pack_weights", "from_moe", "unstack_experts", "upcycle"])
def test_readers_of_whole_weights_refuse_sharded_ones(found, kind, reader):
    if reader == "upcycle":
        kind = "fully_shard"
    text = found["refusals"][f"{reader} after {kind}"]
    assert text.startswith("ValueError: ")
    assert "(DTensor) must not be sharded between ranks" in text


def test_lora_comes_before_weights_are_replicated(found):
    text = found["refusals"]["add after DistributedDataParallel"]
    assert "reduces only gradients of parameters that existed when it was created" in text


def test_a_write_that_fails_is_told_to_all_ranks(found):
    assert found["failures"] == ["NotADirectoryError", "CollectiveError"]
