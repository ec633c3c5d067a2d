"""What the compiled CPU operators do to the process that they run in, and it to them."""

import importlib
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from unimoe_kernels import (
    available_backends,
    grouped_lora,
    grouped_mm,
    moe_mlp,
    permute,
    swiglu,
    topk_router,
    unpermute,
)
from unimoe_kernels import expert_sort as sort_by_expert

pytestmark = pytest.mark.skipif(
    available_backends("moe_mlp", "cpu")[0] != "cpp", reason="needs the compiled extension"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
T, D, F, E, K = 400, 96, 160, 3, 2


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(dtype):
    """Outputs and gradients of all operators, on sizes that several threads share."""
    torch.manual_seed(0)
    routed = topk_router(logits := torch.randn(T, E, requires_grad=True), K)
    sort = sort_by_expert(routed.ids, E)
    x = torch.randn(T, D).to(dtype).requires_grad_()
    up, down, lora_a, lora_b = (
        (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype).requires_grad_()
        for shape in ((E, 2 * F, D), (E, D, F), (E, 8, D), (E, 2 * F, 8))
    )
    rows = permute(x, sort, K)
    hidden = grouped_mm(rows, up, sort.expert_offsets)
    hidden = hidden + grouped_lora(rows, lora_a, lora_b, sort.expert_offsets)
    y = grouped_mm(swiglu(hidden), down, sort.expert_offsets)
    y = unpermute(y, sort, K, routed.scores) + moe_mlp(x, up, down, routed.ids, routed.scores)
    loss = (y * torch.randn_like(y)).sum() + routed.load_balancing_loss + routed.router_z_loss
    leaves = (logits, x, up, down, lora_a, lora_b)
    return [y, *routed, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_the_same_to_the_bit_on_any_number_of_threads(threads, dtype):
    results = []
    for number in (1, 2, 2, 1):
        threads(number)
        results.append(everything(dtype))
    assert results[0][0].abs().max() > 1
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


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


class RoutesInItsWorker(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return everything(torch.float32)[0].detach()


def test_works_in_forked_data_loaders():
    expected = everything(torch.float32)[0]
    loader = DataLoader(
        RoutesInItsWorker(), num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for (y,) in loader:
        assert torch.equal(y, expected)
