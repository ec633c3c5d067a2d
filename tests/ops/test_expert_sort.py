import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unimoe_kernels
from unimoe_kernels import _checks, expert_sort
from unimoe_kernels.testing import ROUTINGS, sample_routing

OP = "expert_sort"


def sort_by_hand(ids, num_experts):
    """The definition, with lists."""
    flat = ids.flatten().tolist()
    bucket = [e if e < num_experts else num_experts for e in flat]
    order = sorted(range(len(flat)), key=lambda n: (bucket[n], n))
    inverse = [order.index(n) for n in range(len(flat))]
    counts = [bucket.count(e) for e in range(num_experts)]
    offsets = [sum(counts[:e]) for e in range(num_experts + 1)]
    return order, inverse, counts, offsets


def check(ids, num_experts):
    sort = expert_sort(ids, num_experts)
    for name, actual, expected in zip(
        sort._fields, sort, sort_by_hand(ids, num_experts), strict=True
    ):
        assert actual.dtype == torch.int32
        assert actual.device.type == ids.device.type
        assert actual.tolist() == expected, name


def test_expert_sort_example(backend):
    sort = expert_sort(torch.tensor([[0, 2], [2, 1], [0, 1]], device=backend.device), 3)
    assert sort.row_order.tolist() == [0, 4, 3, 5, 1, 2]
    assert sort.inverse_order.tolist() == [0, 4, 5, 2, 1, 3]
    assert sort.tokens_per_expert.tolist() == [2, 2, 2]
    assert sort.expert_offsets.tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"), [(50, 2, 4), (150, 3, 37), (300, 4, 37)]
)
def test_expert_sort_matches_definition(backend, kind, num_tokens, top_k, num_experts):
    ids, _ = sample_routing(kind, num_tokens, top_k, num_experts, device=backend.device)
    check(ids, num_experts)
    # The upper half of the experts belongs to another rank.
    check(ids, max(1, num_experts // 2))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("num_rows", "num_experts"),
    [
        *((20_011, 5), (1, 33), (31, 1), (32, 32), (33, 31), (1025, 257), (4097, 1000)),
        # Around what kernels sort in one part; a part is smaller where experts are many.
        *((128, 128), (8192, 128), (8193, 128), (16_384, 2), (33_000, 12_000)),
    ],
)
def test_expert_sort_of_many_rows(backend, num_rows, num_experts, dtype):
    if backend.interpreted and num_rows * num_experts > 2**21:
        pytest.skip("takes Triton's interpreter a minute")
    ids = torch.randint(-1, num_experts + 2, (num_rows, 1), dtype=dtype).to(backend.device)
    sort = expert_sort(ids, num_experts)
    flat = ids.flatten().long()
    buckets, order = flat.where(flat >= 0, num_experts).clamp(max=num_experts).sort(stable=True)
    assert torch.equal(sort.row_order, order.int())
    assert torch.equal(sort.inverse_order[order], torch.arange(num_rows).to(sort.inverse_order))
    counts = buckets.bincount(minlength=num_experts + 1)[:num_experts]
    assert torch.equal(sort.tokens_per_expert, counts.int())
    assert sort.expert_offsets[0] == 0
    assert torch.equal(sort.expert_offsets[1:], sort.tokens_per_expert.cumsum(0).int())


def test_expert_sort_is_deterministic(backend):
    ids, _ = sample_routing("zipf", 400, 2, 5, device=backend.device)
    first, second = expert_sort(ids, 5), expert_sort(ids, 5)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@settings(max_examples=20)
@given(data=st.data())
def test_expert_sort_any_shape(data):
    num_experts = data.draw(st.integers(1, 20))
    num_tokens, top_k = data.draw(st.integers(0, 65)), data.draw(st.integers(1, 4))
    rows = st.lists(
        st.integers(0, num_experts + 2), min_size=num_tokens * top_k, max_size=num_tokens * top_k
    )
    ids = torch.tensor(
        data.draw(rows), dtype=data.draw(st.sampled_from([torch.int32, torch.int64]))
    )
    ids = ids.view(num_tokens, top_k)
    if data.draw(st.booleans()):
        ids = ids.t().contiguous().t()
    for name in unimoe_kernels.available_backends(OP, "cpu"):
        with unimoe_kernels.use_backend(name):
            check(ids, num_experts)


@pytest.mark.parametrize(
    ("ids", "num_experts"),
    [
        pytest.param([], 3, id="T=0"),
        pytest.param([[1, 0]], 2, id="T=1"),
        pytest.param([[0], [0], [0]], 1, id="E=1"),
        pytest.param([[1, 0, 2], [2, 1, 0]], 3, id="K=E"),
        pytest.param([[0, 3], [3, 0]], 4, id="experts without rows"),
        pytest.param([[2], [2], [2], [2]], 4, id="one expert has all rows"),
        pytest.param([[5, 4], [7, 9]], 4, id="all rows are another rank's"),
        pytest.param([2**31 - 1, 0, 4], 4, id="largest int32"),
    ],
)
def test_expert_sort_edge(backend, ids, num_experts):
    check(torch.tensor(ids, dtype=torch.int32, device=backend.device), num_experts)


def test_expert_sort_takes_negative_ids_for_another_ranks(backend):
    sort = expert_sort(torch.tensor([0, -1, 1, -7], device=backend.device), 2)
    assert sort.row_order.tolist() == [0, 2, 1, 3]
    assert sort.expert_offsets.tolist() == [0, 1, 2]


def test_expert_sort_opcheck(overload):
    op = getattr(torch.ops.unimoe.expert_sort, overload)
    for ids in (torch.tensor([0, 2, 2, 1, 0, 1, 3]), torch.tensor([])):
        torch.library.opcheck(op, (ids.int(), 3))
        torch.library.opcheck(op, (ids.long(), 3))


def test_expert_sort_rejects_bad_arguments(monkeypatch):
    ids = torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"num_experts \(0\) must be at least 1"):
        expert_sort(ids, 0)
    with pytest.raises(ValueError, match=r"ids \(shape \(1, 2, 2\)\) must have shape \[T, K\]"):
        expert_sort(ids[None], 2)
    with pytest.raises(TypeError, match=r"ids \(torch.float32\) must have dtype int32, int64"):
        expert_sort(ids.float(), 2)
    with pytest.raises(
        ValueError, match=r"ids \(2147483648 elements\) must have fewer than 2\*\*31"
    ):
        expert_sort(ids[:1, :1].expand(2**16, 2**15), 2)
    monkeypatch.setattr(_checks, "VALUE_CHECKS", True)
    with pytest.raises(ValueError, match=r"ids \(minimum -3\) must not be negative"):
        expert_sort(ids - 3, 2)


def test_expert_sort_under_vmap():
    ids = torch.stack([sample_routing("zipf", 7, 2, 5, seed=seed)[0] for seed in range(3)])
    # Two experts belong to another rank.
    batched = torch.vmap(lambda one: expert_sort(one, 3))(ids)
    for index, one in enumerate(ids):
        for actual, expected in zip(batched, expert_sort(one, 3), strict=True):
            assert actual[index].equal(expected)
            assert actual.dtype == expected.dtype


def test_expert_sort_of_ids_beyond_32_bits_drops_them(backend):
    ids = torch.tensor([2**32, 1, 2**31, -(2**32), 2**40 + 1, 0], device=backend.device)
    sort = expert_sort(ids, 2)
    assert sort.row_order.tolist() == [5, 1, 0, 2, 3, 4]
    assert sort.expert_offsets.tolist() == [0, 1, 2]
