"""Scenarios of `test_all_to_all.py`: rows between ranks, without layers."""

import doctest
import itertools

import torch
from op_group import gathered, message

from unimoe_kernels import _checks
from unimoe_kernels.distributed import all_to_all, count_traffic
from unimoe_kernels.testing import relative_error


def example(r):
    """Runs the example of the docstring; returns its statements and failures on each rank."""
    names = {"torch": torch, "all_to_all": all_to_all, "group": r.group}
    (test,) = doctest.DocTestFinder().find(all_to_all, globs=names, module=False)
    ran = doctest.DocTestRunner().run(test)
    return gathered([ran.attempted, ran.failed], r)


def values_and_gradients(r):
    """Each row says where it is from and to; the gradient of a row is a number of its target."""
    errors = []
    for dtype, empty in itertools.product(
        (torch.float64, torch.float32, torch.bfloat16, torch.float16), (False, True)
    ):
        sent, came = r.splits(empty)
        rows = torch.cat(
            [torch.full((n, 2), 10.0 * r.rank + t + 1) for t, n in enumerate(sent)]
        ).to(dtype)
        rows.requires_grad_()
        out = all_to_all(rows, sent, came, r.group)
        expected = [torch.full((n, 2), 10.0 * s + r.rank + 1) for s, n in enumerate(came)]
        errors.append(relative_error(out, torch.cat(expected)))
        out.backward(torch.full_like(out, 3 + r.rank))
        expected = [torch.full((n, 2), 3.0 + t) for t, n in enumerate(sent)]
        errors.append(relative_error(rows.grad, torch.cat(expected)))
    return max(errors)


def opcheck(r):
    sent, came = r.splits()
    rows = torch.randn(sum(sent), 2, dtype=torch.float64, requires_grad=True)
    results = torch.library.opcheck(
        torch.ops.unimoe.all_to_all.default, (rows, sent, came, r.group.group_name)
    )
    return sorted(set(results.values()))


def compiled(r):
    sent, came = r.splits()
    rows = torch.randn(sum(sent), 2, dtype=torch.float64, requires_grad=True)

    def step(rows):
        return (all_to_all(2 * rows, sent, came, r.group) ** 2).sum()

    expected = torch.autograd.grad(step(rows), rows)[0]
    step = torch.compile(step, fullgraph=True, backend="aot_eager")
    return relative_error(torch.autograd.grad(step(rows), rows)[0], expected)


def traffic(r):
    sent, came = r.splits()
    rows = torch.randn(sum(sent), 2, dtype=torch.float32, requires_grad=True)
    with count_traffic() as forward:
        out = all_to_all(rows, sent, came, r.group)
    with count_traffic() as backward:
        out.sum().backward()
    others = [n for i, n in enumerate(sent) if i != r.rank]
    from_others = [n for i, n in enumerate(came) if i != r.rank]
    return [
        forward.sent == 8 * sum(others) == backward.received,
        forward.received == 8 * sum(from_others) == backward.sent,
        forward.kept == 8 * sent[r.rank] == backward.kept,
        forward.transfers == backward.transfers == 1,
        forward.largest_buffer == 8 * sum(came),
    ]


def refusals(r):
    rows = torch.zeros(3, 2)
    zeros = [0] * r.world
    return [
        message(lambda: all_to_all(rows, [3], zeros, r.group)),
        message(lambda: all_to_all(rows, [3, *zeros[1:]], [-1, *zeros[1:]], r.group)),
        message(lambda: all_to_all(rows, [2, *zeros[1:]], zeros, r.group)),
        message(lambda: all_to_all([1], zeros, zeros, r.group)),
    ]


def disagreeing_splits(r):
    """The last rank expects a row more of rank 0 than it gets."""
    rows = torch.zeros(r.world, 2)
    came = [1] * r.world
    if r.rank == r.world - 1:
        came[0] = 2
    _checks.VALUE_CHECKS = True
    text = message(lambda: all_to_all(rows, [1] * r.world, came, r.group))
    _checks.VALUE_CHECKS = False
    return gathered(text, r)[-1]


SCENARIOS = (
    values_and_gradients,
    opcheck,
    compiled,
    traffic,
    refusals,
    disagreeing_splits,
)
