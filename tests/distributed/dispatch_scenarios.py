"""Scenarios of `test_dispatcher.py`: chunks, buffers, and ranks that are not in the same call."""

import torch
from op_group import K, gathered, layer, message

from unimoe_kernels.distributed import ExpertDispatcher, Transfer, parallelize_moe
from unimoe_kernels.testing import relative_error


def refused_dispatchers(r):
    return [
        message(lambda: ExpertDispatcher(r.group, 2 * r.world + 1, "layer")),
        message(lambda: ExpertDispatcher(r.group, r.world, num_chunks=0)),
        message(lambda: ExpertDispatcher(r.group, r.world, max_rows=0)),
    ]


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


SCENARIOS = (refused_dispatchers, bounded_buffers, order, another_call)
