"""LoRA of experts whose weights lie on two ranks; `lora_ranks.py` is what they run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RANKS = Path(__file__).with_name("lora_ranks.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora_ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, RANKS, folder, str(rank)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        texts = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(texts)
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "case", ["mixtral, fully_shard", "layer, fully_shard", "layer, parallelize_moe"]
)
def test_the_adapter_is_that_of_one_process(found, case):
    assert found["files"][case] is True


def test_whole_weights_know_that_they_are_merged(found):
    error, merged = found["merged"]
    assert error < 1e-12
    assert merged


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
