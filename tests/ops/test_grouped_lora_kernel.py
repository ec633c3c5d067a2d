"""How the Triton kernels of `grouped_lora` share out work, in the interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from unimoe_kernels import _backends, grouped_lora, use_backend
from unimoe_kernels._triton import launch
from unimoe_kernels.testing import assert_close_to_float64

pytestmark = pytest.mark.skipif(
    "triton" not in _backends.available_backends("grouped_lora", "cpu"),
    reason="kernels run on the GPU",
)

COUNTS = {"one row": (0, 1), "ragged": (3, 0, 20, 1), "decode": (1, 1, 0, 1)}
NAMES = ("y", "grad of x", "grad of lora_A", "grad of lora_B")


@pytest.fixture
def launched(monkeypatch):
    """Lists the names of the kernels that are launched."""
    from triton.runtime.interpreter import GridExecutor

    names, run = [], GridExecutor.__call__

    def record(self, *args, **kwargs):
        names.append(self.fn.__name__.removesuffix("_kernel"))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", record)
    return names


def assert_right(counts, d, f, rank, dtype=torch.float32, extra=2):
    """Compares output and gradients of random rows with float64."""
    weights = {
        "lora_A": torch.randn(len(counts), rank, d, dtype=dtype) / d**0.5,
        "lora_B": torch.randn(len(counts), f, rank, dtype=dtype) / rank**0.5,
    }
    inputs = [torch.randn(sum(counts) + extra, d, dtype=dtype), *weights.values()]
    inputs = [value.requires_grad_() for value in inputs]
    grad = torch.randn(sum(counts) + extra, f, dtype=dtype)
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    with use_backend("triton"):
        y = grouped_lora(*inputs, offsets, 0.3)
        actual = y, *torch.autograd.grad(y, inputs, grad)
    x, lora_A, lora_B = exact = [value.detach().double().requires_grad_() for value in inputs]
    parts = zip(x.split([*counts, extra]), lora_A, lora_B, strict=False)
    y = torch.cat([*(0.3 * (part @ a.T) @ b.T for part, a, b in parts), x.new_zeros(extra, f)])
    expected = y, *torch.autograd.grad(y, exact, grad.double())
    for name, *values in zip(NAMES, actual, expected, strict=True):
        assert_close_to_float64(*values, name=name)


@pytest.mark.parametrize("case", COUNTS)
@pytest.mark.parametrize("processors", [1, 5, 64])
def test_columns_are_shared_out(monkeypatch, launched, case, processors):
    monkeypatch.setattr(launch, "STAND_IN", launch.Device(0, processors, 0))
    assert_right(COUNTS[case], d=20, f=200, rank=3)
    assert launched == ["grouped_lora", "grouped_lora", "grouped_lora_wgrad"]


@pytest.mark.parametrize("case", COUNTS)
@pytest.mark.parametrize(
    ("dtype", "rank"), [(torch.float32, 20), (torch.float64, 3)], ids=["float32-20", "float64-3"]
)
def test_long_sums_are_shared_out(monkeypatch, launched, case, dtype, rank):
    from unimoe_kernels._triton import low_rank

    monkeypatch.setattr(low_rank, "LONG_SUM", 1)
    monkeypatch.setattr(launch, "STAND_IN", launch.Device(0, 64, 0))
    # Three steps along the sum leave some of the chunks empty; the backward sums over F.
    assert_right(COUNTS[case], d=80, f=300, rank=rank, dtype=dtype)
    assert launched == [*["grouped_lora_partial", "grouped_lora"] * 2, "grouped_lora_wgrad"]


def test_ranks_beyond_the_registers_are_composed(launched):
    from unimoe_kernels.ops.grouped_lora import kernel

    widest = max(r for r in range(1, 300) if kernel.covers(*weights_of_rank(r)))
    assert_right((5, 0, 3), d=16, f=16, rank=widest)
    assert "grouped_mm" not in launched
    launched.clear()
    assert_right((5, 0, 3), d=16, f=16, rank=widest + 1)
    assert set(launched) == {"grouped_mm", "grouped_mm_wgrad"}


def test_many_rows_are_composed(launched):
    from unimoe_kernels.ops.grouped_lora import kernel

    most = kernel.MOST_ROWS
    assert_right((2 * most, 0), d=16, f=16, rank=3, extra=0)
    assert "grouped_mm" not in launched
    launched.clear()
    assert_right((2 * most, 1), d=16, f=16, rank=3, extra=0)
    assert set(launched) == {"grouped_mm", "grouped_mm_wgrad"}


def weights_of_rank(rank, dtype=torch.float32):
    x = torch.empty(4, 8, dtype=dtype)
    return x, x.new_empty(2, rank, 8), x.new_empty(2, 8, rank)


def test_what_the_kernels_cover():
    from unimoe_kernels.ops.grouped_lora import kernel

    assert kernel.covers(*weights_of_rank(128, torch.bfloat16))
    assert not kernel.covers(*weights_of_rank(129, torch.bfloat16))
    assert not kernel.covers(*weights_of_rank(128))
    assert not kernel.covers(*weights_of_rank(0))


@pytest.mark.parametrize("sizes", [(0, 4, 2), (4, 0, 2), (4, 4, 0)])
def test_empty_sizes(sizes):
    d, f, rank = sizes
    inputs = [torch.ones(3, d), torch.ones(2, rank, d), torch.ones(2, f, rank)]
    inputs = [value.requires_grad_() for value in inputs]
    offsets = torch.tensor([0, 1, 2], dtype=torch.int32)
    with use_backend("triton"):
        y = grouped_lora(*inputs, offsets)
        grads = torch.autograd.grad(y, inputs, torch.ones_like(y))
    assert y.shape == (3, f)
    assert not y.any()
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("needs_x", [False, True])
def test_a_frozen_input_costs_no_gradient(launched, needs_x):
    inputs = [torch.ones(3, 4), torch.ones(2, 2, 4), torch.ones(2, 40, 2)]
    inputs = [value.requires_grad_(i > 0 or needs_x) for i, value in enumerate(inputs)]
    offsets = torch.tensor([0, 1, 2], dtype=torch.int32)
    with use_backend("triton"):
        y = grouped_lora(*inputs, offsets)
        y.backward(torch.ones_like(y))
    assert (inputs[0].grad is not None) == needs_x
    # Each of the 40 columns adds 1 * 1 to both products, each of the 4 numbers of x 1.
    assert torch.equal(inputs[1].grad, torch.full((2, 2, 4), 40.0))
    assert torch.equal(inputs[2].grad, torch.full((2, 40, 2), 4.0))
