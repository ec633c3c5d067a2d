"""Launches through compiled kernels are those of Triton's front door."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """What each call launched the first time, and the second time, past the front door."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("launches.py"))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return {row["name"]: row for row in map(json.loads, result.stdout.splitlines())}


def name_of(launch):
    """The kernel of a launch; a checksum of its code follows."""
    return launch[0].split()[0]


def test_the_second_call_launches_what_the_first_one_did(calls):
    assert len(calls) == 11
    for name, row in calls.items():
        assert row["first"], name
        assert row["second"] == row["first"], name


def test_every_kernel_of_a_layer_is_launched(calls):
    names = {name_of(one) for row in calls.values() for one in row["first"]}
    assert {
        "sort_small_kernel",
        "gated_kernel",
        "grouped_mm_kernel",
        "unpermute_kernel",
        "count_kernel",
        "place_kernel",
        "gated_backward_kernel",
        "score_grad_kernel",
        "permute_kernel",
        "grouped_mm_wgrad_kernel",
        "topk_router_kernel",
        "reduce_kernel",
        "count_choices_kernel",
        "topk_router_backward_kernel",
        "swiglu_kernel",
        "swiglu_backward_kernel",
    } <= names


def test_large_tiles_take_descriptors_again(calls):
    (training,) = (row for name, row in calls.items() if "training" in name)
    described = [one for one in training["second"] if any("descriptor" in arg for arg in one)]
    assert {name_of(one) for one in described} >= {"gated_kernel", "grouped_mm_wgrad_kernel"}


@pytest.mark.parametrize("name", ["copy", "multiply_quantized", "correct"])
def test_a_dtype_is_a_variant_of_its_own(calls, name):
    codes = []
    for dtype in ("torch.bfloat16", "torch.float32"):
        launches = calls[f"{name} {dtype}"]["first"]
        assert any(dtype in arg for one in launches for arg in one[2:])
        codes.append([one[0] for one in launches])
    assert codes[0][0].split()[0] == codes[1][0].split()[0]
    assert codes[0][0] != codes[1][0], "the same code"


def test_alignment_is_a_variant_of_its_own(calls):
    (aligned, _), (other,) = calls["swiglu"]["first"], calls["unaligned swiglu"]["first"]
    assert name_of(aligned) == name_of(other) == "swiglu_kernel"
    assert aligned[0] != other[0], "the same code"
