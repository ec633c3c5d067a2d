"""The layer in CUDA C++ in one call, emulated: few rows, of which nothing is kept."""

import os

import pytest
import registry
import torch

from unimoe_kernels import moe_mlp, use_backend
from unimoe_kernels.ops import cuda_matmul
from unimoe_kernels.testing import ROUTINGS, relative_error, sample_routing

pytestmark = pytest.mark.skipif(
    "UNIMOE_CUDA_ON_CPU" not in os.environ, reason="runs on emulated kernels"
)

EXPERTS, TOP_K = 6, 2


def sample(tokens=20, width=72, expert_width=40, kind="zipf", dtype=torch.bfloat16):
    """Arguments of `moe_mlp`; outputs are of order one."""
    ids, scores = sample_routing(kind, tokens, TOP_K, EXPERTS)
    floats = {
        "x": torch.randn(tokens, width),
        "gate_up_proj": torch.randn(EXPERTS, 2 * expert_width, width) / width**0.5,
        "down_proj": torch.randn(EXPERTS, width, expert_width) / expert_width**0.5,
    }
    values = {name: value.to(dtype) for name, value in floats.items()}
    return values | {"ids": ids, "scores": scores}


def exact(arguments):
    names = ("x", "gate_up_proj", "down_proj", "scores")
    with use_backend("reference"):
        return moe_mlp(**arguments | {name: arguments[name].double() for name in names})


@pytest.fixture
def names(monkeypatch):
    """Lets `moe_mlp` take CUDA C++; a list of the operators that it dispatches to."""
    gpu = cuda_matmul.Gpu((9, 0), ("9.0a",))
    monkeypatch.setattr(cuda_matmul, "STAND_IN", gpu)
    registry.set_available(monkeypatch, "moe_mlp", {"cpu": ("cuda", "reference"), "cuda": ()})
    called = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    with Record():
        yield called


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layer_is_close_to_float64(names, kind, dtype):
    arguments = sample(kind=kind, dtype=dtype)
    del names[:]
    y = moe_mlp(**arguments)
    assert names == ["unimoe::moe_mlp_cuda_inference"]
    expected = exact(arguments)
    assert relative_error(y, expected) < 4 * torch.finfo(dtype).eps
    assert relative_error(torch.zeros_like(y), expected) > 0.5
    assert torch.equal(moe_mlp(**arguments), y)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_sentinels_add_nothing(names, dtype):
    arguments = sample()
    arguments["ids"] = arguments["ids"].to(dtype)
    arguments["ids"][::3, 1] = EXPERTS
    arguments["ids"][5] = 2**31 - 1
    y = moe_mlp(**arguments)
    assert "unimoe::moe_mlp_cuda_inference" in names
    assert relative_error(y, exact(arguments)) < 4 * torch.finfo(torch.bfloat16).eps
    assert not y[5].any()


def test_ids_may_be_part_of_a_larger_tensor(names):
    arguments = sample()
    expected = moe_mlp(**arguments)
    larger = torch.full((33, TOP_K), EXPERTS, dtype=torch.int32)
    larger[7:27] = arguments["ids"]
    assert torch.equal(moe_mlp(**arguments | {"ids": larger[7:27]}), expected)


def test_one_token_and_no_token():
    for tokens in (1, 0):
        arguments = sample(tokens, kind="uniform")
        values = (arguments[name] for name in ("x", "gate_up_proj", "down_proj", "ids", "scores"))
        y, hidden, order, inverse, offsets = torch.ops.unimoe.moe_mlp_cuda(*values, False)
        assert relative_error(y, exact(arguments)) < 2e-2 if tokens else y.shape == (0, 72)
        assert hidden.shape == (0, 80)
        assert order.shape == inverse.shape == (tokens * TOP_K,)
        assert offsets[-1] == tokens * TOP_K


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"x": torch.zeros(20, 71).bfloat16()}, r"gate_up_proj \(shape .* must be \[E, 2F, 71\]"),
        ({"x": torch.zeros(20, 72)}, "must be bfloat16 or float16"),
        ({"ids": torch.zeros(19, 2, dtype=torch.int32)}, "ids .* must have 20 rows"),
        ({"ids": torch.zeros(20, 0, dtype=torch.int32)}, "ids .* must have columns"),
        ({"scores": torch.zeros(20, 2).bfloat16()}, "scores must be float32"),
        ({"down_proj": torch.zeros(6, 72, 48).bfloat16()}, r"down_proj \(shape"),
    ],
)
def test_wrong_arguments_are_named(changes, expected):
    arguments = sample() | changes
    values = (arguments[name] for name in ("x", "gate_up_proj", "down_proj", "ids", "scores"))
    with pytest.raises(RuntimeError, match=expected):
        torch.ops.unimoe.moe_mlp_cuda(*values, False)


def test_what_is_not_emulated_is_refused():
    """Many rows, and all that keeps something, run in kernels for compute capability 9.0."""
    arguments = sample()
    values = [arguments[name] for name in ("x", "gate_up_proj", "down_proj", "ids", "scores")]
    with pytest.raises(RuntimeError, match="too much shared memory"):
        torch.ops.unimoe.moe_mlp_cuda(*values, True)
    x, weight = torch.zeros(9, 72).bfloat16(), torch.zeros(2, 71, 72).bfloat16()
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"the second size of weight \(71\) must be a positive"):
        torch.ops.unimoe.grouped_mm_sm90(x, weight, offsets)
    with pytest.raises(RuntimeError, match=r"expert_offsets \(shape \[3\]\) must be \[4\]"):
        torch.ops.unimoe.grouped_mm_sm90(x, torch.zeros(3, 72, 72).bfloat16(), offsets)
    with pytest.raises(RuntimeError, match=r"x \(shape \[8, 72\]\) must be \[9, 72\]"):
        torch.ops.unimoe.grouped_mm_wgrad_sm90(x, x[:8], offsets)


def test_weight_gradient_of_no_rows_is_zero():
    rows = torch.zeros(0, 72).bfloat16()
    offsets = torch.zeros(4, dtype=torch.int32)
    grad = torch.ops.unimoe.grouped_mm_wgrad_sm90(rows, rows, offsets)
    assert torch.equal(grad, torch.zeros(3, 72, 72).bfloat16())
