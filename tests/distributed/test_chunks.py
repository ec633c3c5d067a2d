"""Chunks of a dispatch: every row in one of them, as many rows in each, experts kept together."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unimoe_kernels import expert_sort
from unimoe_kernels.distributed.dispatch.chunks import cut_evenly, order_by_chunk


@st.composite
def counts(draw):
    ranks, held = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    number = st.one_of(st.just(0), st.integers(0, 7), st.integers(0, 200))
    size = ranks * ranks * held
    numbers = draw(st.lists(number, min_size=size, max_size=size))
    return torch.tensor(numbers).view(ranks, -1)


def test_example():
    chunks = cut_evenly(torch.tensor([[4, 2], [2, 0]]), 2)
    assert chunks.tolist() == [[[2, 1], [1, 0]]] * 2
    counts_RE = torch.tensor([[4, 2], [2, 0]])
    with torch.device("meta"):  # a default device, where counts are not
        assert cut_evenly(counts_RE, 2).equal(chunks)


@given(counts(), st.integers(1, 6))
def test_each_rank_receives_as_much_in_each_chunk(counts_RE, num_chunks):
    ranks = len(counts_RE)
    counts_CRE = cut_evenly(counts_RE, num_chunks)
    assert (counts_CRE >= 0).all()
    assert torch.equal(counts_CRE.sum(0), counts_RE)
    received_CR = counts_CRE.view(num_chunks, ranks, ranks, -1).sum((1, 3))
    limit_R = -(-received_CR.sum(0) // num_chunks) + ranks - 1
    assert (received_CR <= limit_R).all()


@given(counts(), st.integers(2, 6))
def test_few_experts_are_in_several_chunks(counts_RE, num_chunks):
    """A cut goes through at most one expert of each rank, so that weights are read once."""
    ranks = len(counts_RE)
    pieces_CE = (cut_evenly(counts_RE, num_chunks).sum(1) > 0).sum(0)
    more_R = (pieces_CE - 1).clamp(min=0).view(ranks, -1).sum(1)
    assert (more_R <= num_chunks - 1).all()


@pytest.mark.parametrize("skipped", [0, 3])
@given(counts=counts(), num_chunks=st.integers(1, 6), seed=st.integers(0, 99))
def test_rows_lie_by_chunk_and_then_by_expert(skipped, counts, num_chunks, seed):
    num_experts = counts.shape[1]
    counts_CE = cut_evenly(counts, num_chunks)[:, 0]
    ids_N = torch.arange(num_experts).repeat_interleave(counts[0])
    ids_N = torch.cat([ids_N, torch.full((skipped,), num_experts)])
    ids_N = ids_N[torch.randperm(len(ids_N), generator=torch.Generator().manual_seed(seed))]
    before = expert_sort(ids_N, num_experts)
    sort = order_by_chunk(before, counts_CE)
    order_N = sort.row_order.long()
    assert torch.equal(order_N[sort.inverse_order.long()], torch.arange(len(ids_N)))
    expected_N = torch.arange(num_experts).repeat(num_chunks).repeat_interleave(counts_CE.flatten())
    taken = len(ids_N) - skipped
    assert torch.equal(ids_N[order_N[:taken]], expected_N)
    assert (ids_N[order_N[taken:]] == num_experts).all()
    for expert in range(num_experts):
        rows = order_N[:taken][expected_N == expert]
        assert torch.equal(rows, rows.sort().values), "rows of an expert keep their order"
    assert torch.equal(sort.expert_offsets, before.expert_offsets)
