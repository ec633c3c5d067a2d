"""Scenarios of `test_dispatcher.py`: what `parallelize_moe` refuses, and the sum of gradients."""

import torch
from op_group import E, K, gathered, layer, message

from unimoe_kernels import MoE
from unimoe_kernels.distributed import parallelize_moe
from unimoe_kernels.testing import relative_error


def accumulation(r):
    """Gradients of two backwards add up, each summed over ranks once."""
    mesh = r.data_mesh
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    parallelize_moe(model, mesh)
    numbers = [1.0 + 10 * step + r.rank for step in range(2)]
    for number in numbers:
        model(torch.full((1, 3), number, dtype=torch.float64)).sum().backward()
    expected = sum(gathered(sum(numbers), r))
    return relative_error(model.weight.grad, torch.full((2, 3), expected))


def gradients_alone(r):
    """`torch.autograd.grad` gives this rank's gradients and leaves `.grad` to the backward."""
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    parallelize_moe(model, r.data_mesh)
    number = 1.0 + r.rank
    loss = model(torch.full((1, 3), number, dtype=torch.float64)).sum()
    own = torch.autograd.grad(loss, model.weight, retain_graph=True)[0]
    untouched = model.weight.grad is None
    loss.backward()
    expected = torch.full((2, 3), sum(gathered(number, r)), dtype=torch.float64)
    errors = [
        relative_error(own, torch.full((2, 3), number, dtype=torch.float64)),
        relative_error(model.weight.grad, expected),
    ]
    return [untouched, max(errors)]


def uneven_accumulation(r):
    """Gradients of backwards add up also where some of them reach a parameter on one rank only."""
    names = [f"of rank {rank}" for rank in range(r.world)]
    model = torch.nn.ParameterDict(
        {name: torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)) for name in ("all", *names)}
    )
    parallelize_moe(model, r.data_mesh)
    expected = dict.fromkeys(model, 0.0)
    # Of each step: the ranks that reach a parameter of their own.
    for step, ranks in enumerate(([0], range(r.world), [r.world - 1], [0], [])):
        reached = [rank for rank in ranks if rank < r.world]
        total = model["all"]
        for rank in reached:
            # Some parameters are reached by the rank that they are named after, others by all.
            if rank == r.rank or step == 1:
                total = total + (step + 1 + r.rank) * model[names[rank]]
        total.sum().backward()
        expected["all"] += r.world
        for rank in reached:
            by = range(r.world) if step == 1 else [rank]
            expected[names[rank]] += sum(step + 1 + other for other in by)
    return max(
        relative_error(parameter.grad, torch.full((3,), expected[name], dtype=torch.float64))
        for name, parameter in model.items()
    )


def sums_together(r):
    """A rank whose backward reaches no parameter of one sum takes part in it nevertheless."""
    moe, _ = layer(r)
    parallelize_moe(moe, r.data_mesh)
    router, down = moe.router.weight, moe.experts.down_proj
    (router if r.rank == 0 else down.to_local()).sum().backward()
    return [router.grad.unique().tolist(), down.grad.to_local().unique().tolist()]


def another_model(r):
    """The last rank trains less; nothing is changed on any rank."""
    moe, _ = layer(r)
    moe.router.requires_grad_(r.rank < r.world - 1)
    text = message(lambda: parallelize_moe(moe, r.mesh))
    return [text, moe.experts.dispatcher is None]


def uneven_shards(r):
    moe = MoE(5, 7, E, K)
    return message(lambda: parallelize_moe(moe, r.data_mesh, data="shard"))


def meta_buffers(r):
    moe, _ = layer(r)
    moe.register_buffer("scratch", torch.zeros(2, device="meta"), persistent=False)
    return message(lambda: parallelize_moe(moe, r.mesh))


def twice(r):
    moe, _ = layer(r)
    parallelize_moe(moe, r.mesh)
    return message(lambda: parallelize_moe(moe, r.mesh))


SCENARIOS = (
    accumulation,
    uneven_accumulation,
    gradients_alone,
    sums_together,
    another_model,
    uneven_shards,
    meta_buffers,
    twice,
)
