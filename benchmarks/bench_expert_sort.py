"""Grouping of rows by expert, compared with torch's stable sort."""

import torch

import unimoe_kernels
from unimoe_kernels import expert_sort

from .candidates import Candidate, Work
from .op_problem import Routed
from .shapes import LAYERS


def bench_expert_sort(record, sort_case, device):
    E = LAYERS[sort_case.layer].E
    ids = Routed(sort_case, device).ids
    N = ids.numel()
    expected = ids.flatten().argsort(stable=True)

    def by_torch():
        row_order = ids.flatten().argsort(stable=True)
        inverse_order = torch.empty_like(row_order)
        inverse_order[row_order] = torch.arange(N, device=device)
        counts = torch.bincount(ids.flatten(), minlength=E)
        return row_order, inverse_order, counts, counts.cumsum(0)

    def on(backend):
        def run():
            with unimoe_kernels.use_backend(backend):
                return expert_sort(ids, E)

        return run

    def provider(run):
        def check():
            row_order, inverse_order = run()[:2]
            assert torch.equal(row_order.long(), expected), "row_order is wrong"
            assert torch.equal(expected[inverse_order.long()], torch.arange(N, device=device))

        def timed():
            run()

        return lambda: Candidate(run=timed, check=check)

    _, *others = unimoe_kernels.available_backends("expert_sort", device)
    record(
        sort_case,
        {
            "torch": provider(by_torch),
            "ours": provider(lambda: expert_sort(ids, E)),
            **{f"ours-{backend}": provider(on(backend)) for backend in others},
        },
        Work(0, 4 * (3 * N + 2 * E)),
    )
