"""What each rank of `test_all_to_all.py` and `test_dispatcher.py` runs: one result a scenario."""

import itertools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from launcher import write
from torch.distributed.device_mesh import DeviceMesh

from unimoe_kernels import MoE, _checks
from unimoe_kernels.distributed import (
    ExpertDispatcher,
    Transfer,
    all_to_all,
    count_traffic,
    finish_parallel,
    parallelize_moe,
    start_parallel,
)
from unimoe_kernels.testing import relative_error

D, F, E, K = 8, 12, 8, 3


class Rank:
    """A rank of a group of all, with splits that differ for every pair of ranks."""

    def __init__(self, rank, world, mesh):
        self.rank, self.world, self.mesh = rank, world, mesh
        self.group = mesh.get_group("ep")
        groups = [self.group, dist.new_group([rank], use_local_synchronization=True)]
        ranks = torch.arange(world).view(world, 1)
        self.data_mesh = DeviceMesh.from_group(
            groups, "cpu", mesh=ranks, mesh_dim_names=("dp", "ep")
        )

    def splits(self, empty=False):
        rows = {
            (source, target): 0 if empty and target == 0 else (source + 2 * target) % 4
            for source, target in itertools.product(range(self.world), repeat=2)
        }
        sent = [rows[self.rank, target] for target in range(self.world)]
        came = [rows[source, self.rank] for source in range(self.world)]
        return sent, came


def message(function):
    """The text of the error that a call ends with."""
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def example(r):
    rows, sent, came = [
        (torch.tensor([[1], [2], [3]]), [1, 2], [1, 0]),
        (torch.tensor([[4]]), [0, 1], [2, 1]),
    ][r.rank]
    return gathered(all_to_all(rows, sent, came, r.group).tolist(), r)


def gathered(value, r):
    values = [None] * r.world
    dist.all_gather_object(values, value)
    return values


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
        message(lambda: ExpertDispatcher(r.group, 2 * r.world + 1, "layer")),
        message(lambda: ExpertDispatcher(r.group, r.world, num_chunks=0)),
        message(lambda: ExpertDispatcher(r.group, r.world, max_rows=0)),
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


def layer(r, seed=0, dtype=torch.float64, **options):
    """A layer with weights of order one, and this rank's tokens."""
    torch.manual_seed(seed)
    moe = MoE(D, F, E, K, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    torch.manual_seed(100 + r.rank)
    return moe, torch.randn(5 + 3 * r.rank, D, dtype=dtype)


def beside_one_process(r, moe, x, **parallel):
    """Worst error of output and gradients of x, beside the same layer in one process."""
    x.requires_grad_()
    expected = moe(x)
    expected.square().sum().backward()
    grad, x.grad = x.grad, None
    moe.zero_grad()
    parallelize_moe(moe, r.mesh, **parallel)
    y = moe(x)
    y.square().sum().backward()
    return max(relative_error(y, expected), relative_error(x.grad, grad))


def sentinels(r):
    """Null experts and choices given up belong to nobody and are not sent."""
    options = {"mode": "sparsemixer_renorm", "top_p": 0.7, "num_null_experts": 1}
    moe, x = layer(r, **options, num_shared_experts=2, shared_scores="softmax")
    error = beside_one_process(r, moe, x, num_chunks=2)
    with torch.no_grad(), count_traffic() as moved:
        _, routed = moe(x, return_router=True)
    own = E // r.world
    away = (routed.ids < E) & (routed.ids // own != r.rank)
    return [error, moved.sent - moved_rows(r, routed.ids) * D * 8, int(away.sum())]


def moved_rows(r, ids):
    """Rows that leave with these choices, plus those that come back as answers: what is sent."""
    own = E // r.world
    leave = ((ids < E) & (ids // own != r.rank)).sum()
    tables = [None] * r.world
    dist.all_gather_object(
        tables, [int(((ids < E) & (ids // own == t)).sum()) for t in range(r.world)]
    )
    answered = sum(table[r.rank] for source, table in enumerate(tables) if source != r.rank)
    return int(leave) + answered


def lora(r):
    moe, x = layer(r)
    torch.manual_seed(1)
    moe.experts.add_lora(3, freeze_base=False)
    with torch.no_grad():
        for adapter in moe.experts.expert_lora.values():
            adapter.lora_B.normal_()
    return beside_one_process(r, moe, x)


def merged_lora(r):
    """LoRA of experts on several ranks is merged there; none is added there."""
    moe, x = layer(r)
    refused = []
    torch.manual_seed(1)
    moe.experts.add_lora(3)
    with torch.no_grad():
        for adapter in moe.experts.expert_lora.values():
            adapter.lora_B.normal_()
        expected = moe(x)
        parallelize_moe(moe, r.mesh)
        moe.experts.merge_and_unload_lora()
        refused.append(message(lambda: moe.experts.add_lora(3)))
        return [relative_error(moe(x), expected), *refused]


def autocast(r):
    """Rows travel in the dtype that experts work in."""
    moe, x = layer(r, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = moe(x)
        parallelize_moe(moe, r.mesh)
        with count_traffic() as moved:
            y, routed = moe(x, return_router=True)
    return [relative_error(y, expected), moved.sent - moved_rows(r, routed.ids) * D * 2]


def compiled_layer(r):
    """The dispatch is left out of the graph; what is around it is compiled."""
    moe, x = layer(r, load_balancing_coef=0.1, aux_loss="inject")
    parallelize_moe(moe, r.mesh)
    x.requires_grad_()
    expected = moe(x)
    expected.square().sum().backward()
    grad, x.grad = x.grad, None
    y = torch.compile(moe, backend="aot_eager")(x)
    y.square().sum().backward()
    return max(relative_error(y, expected), relative_error(x.grad, grad))


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


def recomputation(r):
    moe, x = layer(r)
    again = torch.utils.checkpoint.checkpoint
    x.requires_grad_()
    moe(x).square().sum().backward()
    grad, x.grad = x.grad, None
    moe.zero_grad()
    parallelize_moe(moe, r.mesh, num_chunks=2)
    again(moe, x, use_reentrant=False).square().sum().backward()
    return relative_error(x.grad, grad)


def second_derivatives(r):
    moe, x = layer(r)
    parallelize_moe(moe, r.mesh)
    penalty = moe(x.requires_grad_()).square().sum()
    return message(lambda: torch.autograd.grad(penalty, x, create_graph=True))


def frozen_on_one_rank(r):
    """The tokens of rank 0 need no gradient; it still takes part in the backward of the others."""
    moe, x = layer(r)
    moe.experts.requires_grad_(False)
    x.requires_grad_(r.rank > 0)
    moe(x).square().sum().backward()
    grad, x.grad = x.grad, None
    moe.zero_grad()
    parallelize_moe(moe, r.mesh)
    moe(x).square().sum().backward()
    return max(gathered(relative_error(x.grad, grad) if r.rank else 0.0, r))


def bounded_buffers(r):
    """All tokens choose the same K experts, all of them on rank 0."""
    moe, x = layer(r)
    with torch.no_grad():
        x[:, 0] = 4
        moe.router.weight[:K, 0] += 20
        expected = moe(x)
        parallelize_moe(moe, r.mesh, max_rows=10)
        y = moe(x)
    report = moe.experts.dispatcher.report
    return [relative_error(y, expected), *report]


def order(r):
    """What a call of two chunks does one after the other, forwards and backwards."""
    log = []
    moe, x = layer(r)
    parallelize_moe(moe, r.mesh, num_chunks=2)
    send, wait, answer = Transfer.send, Transfer.wait, moe.experts._answer
    kinds = {}

    def logged(transfer, what, backward):
        kind = transfer.operation.split()[0]
        seen = kinds.setdefault(kind, [])
        if transfer not in seen:
            seen.append(transfer)
        log.append(f"{what} {kind} {seen.index(transfer)}{' back' if backward else ''}")

    def logged_send(transfer, rows, backward):
        logged(transfer, "start", backward)
        return send(transfer, rows, backward)

    def logged_wait(transfer, backward):
        logged(transfer, "wait", backward)
        return wait(transfer, backward)

    def logged_answer(rows, ids, scores):
        log.append("matmul")
        out = answer(rows, ids, scores)
        out.register_hook(lambda grad: log.append("matmul back"))
        return out

    Transfer.send, Transfer.wait, moe.experts._answer = logged_send, logged_wait, logged_answer
    try:
        moe(x.requires_grad_()).square().sum().backward()
    finally:
        Transfer.send, Transfer.wait = send, wait
    return log


def another_call(r):
    """Rank 0 runs a layer of another name, then without gradients: all ranks are told."""
    texts = []
    moe, x = layer(r)
    parallelize_moe(moe, r.mesh)
    moe.experts.dispatcher.name = "first" if r.rank == 0 else "second"
    texts.append(message(lambda: moe(x)))
    moe.experts.dispatcher.name = "first"
    with torch.set_grad_enabled(r.rank > 0):
        texts.append(message(lambda: moe(x)))
    moe.experts.dispatcher._calls += r.rank
    texts.append(message(lambda: moe(x)))
    return gathered(texts, r)


def twice(r):
    moe, _ = layer(r)
    parallelize_moe(moe, r.mesh)
    return message(lambda: parallelize_moe(moe, r.mesh))


SCENARIOS = (
    values_and_gradients,
    opcheck,
    compiled,
    traffic,
    refusals,
    disagreeing_splits,
    sentinels,
    lora,
    merged_lora,
    autocast,
    compiled_layer,
    accumulation,
    another_model,
    uneven_shards,
    meta_buffers,
    recomputation,
    second_derivatives,
    frozen_on_one_rank,
    bounded_buffers,
    order,
    another_call,
    twice,
)


def main(folder, rank, world):
    torch.set_num_threads(1)
    mesh = start_parallel(
        1, world, timeout=60, init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    r = Rank(rank, world, mesh)
    results = {}
    for scenario in SCENARIOS + ((example,) if world == 2 else ()):
        results[scenario.__name__] = gathered(scenario(r), r)
    finish_parallel()
    write(folder, rank, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
