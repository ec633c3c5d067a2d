"""What the compiled CPU operators do to the process that they run in, and it to them."""

import importlib
from pathlib import Path

import cases
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from unimoe_kernels import available_backends, grouped_mm, moe_mlp, topk_router

pytestmark = pytest.mark.skipif(
    available_backends("moe_mlp", "cpu")[0] != "cpp", reason="needs the compiled extension"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = cases.Sizes(T=800, D=96, F=160, E=3, K=2, R=8)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def fan_in(shape):
    return shape[-1] if len(shape) == 3 else 1


def everything(dtype):
    """Outputs and gradients of each call of all operators, on sizes that several threads share."""
    torch.manual_seed(0)
    ids = topk_router(torch.randn(SIZES.T, SIZES.E), SIZES.K).ids
    results = []
    for op in cases.operators():
        for case in cases.cases(op):
            shapes = case.shapes(SIZES)
            inputs = [(torch.randn(shape) * fan_in(shape) ** -0.5).to(dtype) for shape in shapes]
            inputs = [value.requires_grad_() for value in inputs]
            result = case.function(ids, SIZES.E, *inputs)
            outputs = result if isinstance(result, tuple) else (result,)
            loss = sum(
                (value * torch.randn_like(value)).sum() for value in outputs if value.requires_grad
            )
            grads = torch.autograd.grad(loss, inputs) if inputs else ()
            results.append((op, [*outputs, *grads]))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_the_same_to_the_bit_on_any_number_of_threads(threads, dtype):
    results = []
    for number in (1, 2, 2, 1):
        threads(number)
        results.append(everything(dtype))
    for op, values in results[0]:
        assert any(value.abs().max() > 1 for value in values), op
    for other in results[1:]:
        for (op, values), (_, others) in zip(results[0], other, strict=True):
            assert all(map(torch.equal, values, others)), op


def test_ten_thousand_calls_leave_memory_flat():
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("needs /proc")
    if "-fsanitize" in importlib.import_module("unimoe_kernels._C").build_info()["flags"]:
        pytest.skip("AddressSanitizer keeps freed memory")
    ids, scores = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    x, up, down = torch.randn(3, 8), torch.randn(2, 16, 8), torch.randn(2, 8, 8)
    wide = torch.randn(100, 8), torch.tensor([0, 100, 100], dtype=torch.int32)

    def calls(number):
        for _ in range(number):
            moe_mlp(x, up, down, ids, scores)
            grouped_mm(wide[0], up, wide[1])
        return int(statm.read_text().split()[1]) * 4096

    before = calls(500)
    assert calls(10_000) - before < 2**20


def all_values():
    """All of them in one tensor."""
    values = [value for _, values in everything(torch.float32) for value in values]
    return torch.cat([value.detach().double().flatten() for value in values])


class RoutesInItsWorker(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return all_values()


def test_works_in_forked_data_loaders():
    expected = all_values()
    loader = DataLoader(
        RoutesInItsWorker(), num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for (y,) in loader:
        assert torch.equal(y, expected)
