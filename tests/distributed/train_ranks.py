"""What each rank of `test_training.py` runs: errors beside one process, by layout and routing."""

import sys
from pathlib import Path

import torch
from launcher import write
from small_model import MAX_NORM, ROUTINGS, SmallModel, batch, joined, loss_of

from unimoe_kernels.distributed import (
    clip_grad_norm,
    count_over_ranks,
    finish_parallel,
    parallelize_moe,
    parameter_groups,
    start_parallel,
)
from unimoe_kernels.testing import relative_error

# Errors of a step add up; other routings differ from the first in what a step does.
STEPS = {"natural": 20}
FEW_STEPS = 5
LEARNING_RATE = 1e-2


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def alone(world, routing):
    """Logits and gradients of the first step, norms and losses of all, weights after the last."""
    model = SmallModel(routing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    found = {"norms": [], "losses": []}
    for step in range(STEPS.get(routing, FEW_STEPS)):
        inputs = joined(world, step, routing)
        optimizer.zero_grad()
        loss, logits = loss_of(model, inputs, (inputs[2] >= 0).sum())
        loss.backward()
        if step == 0:
            found["logits"] = logits.detach()
            found["grads"] = gradients(model)
        found["norms"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        found["losses"].append(loss.item())
        optimizer.step()
    found["weights"] = {name: p.detach() for name, p in model.named_parameters()}
    return found


def gradients(model):
    return {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}


def errors(rank, world, mesh, routing, expected, **options):
    model = SmallModel(routing)
    if rank:
        with torch.no_grad():  # the weights of the first rank count
            for parameter in model.parameters():
                parameter.add_(1)
    parallelize_moe(model, mesh, **options)
    optimizer = torch.optim.AdamW(parameter_groups(model.parameters()), lr=LEARNING_RATE)
    tokens = [len(batch(r, 0, routing)[0]) for r in range(world)]
    own = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    worst = dict.fromkeys(("logits", "grads", "norms", "losses", "weights"), 0.0)

    def compare(what, actual, wanted):
        worst[what] = max(
            worst[what],
            relative_error(actual.detach().cpu(), torch.as_tensor(wanted, dtype=torch.float64)),
        )

    for step in range(STEPS.get(routing, FEW_STEPS)):
        inputs = batch(rank, step, routing)
        optimizer.zero_grad()
        count = count_over_ranks((inputs[2] >= 0).sum(), mesh)
        loss, logits = loss_of(model, inputs, count)
        loss.backward()
        if step == 0:
            compare("logits", logits, expected["logits"][own])
            found = gradients(model)
            missing = expected["grads"].keys() ^ found.keys()
            assert missing <= {"unused.weight", "unused.bias"}, missing
            for name, grad in expected["grads"].items():
                compare("grads", found[name], grad)
        norm = clip_grad_norm(model.parameters(), MAX_NORM)
        compare("norms", norm, expected["norms"][step])
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        # What "inject" adds is in no loss.
        compare("losses", total, expected["losses"][step])
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name.split(".")[0] != "unused" or options.get("data") != "shard":
            compare("weights", whole(parameter.detach()), expected["weights"][name])
    # The worst of all ranks.
    everyone = torch.tensor(list(worst.values()), dtype=torch.float64)
    torch.distributed.all_reduce(everyone, op=torch.distributed.ReduceOp.MAX)
    return dict(zip(worst, everyone.tolist(), strict=True))


def main(folder, rank, world):
    torch.set_num_threads(1)
    expected = {routing: alone(world, routing) for routing in ROUTINGS}
    found = {}
    for expert in (1, 2, 4):
        if world % expert or (world == 4 and expert == 1):
            continue
        mesh = start_parallel(
            world // expert,
            expert,
            timeout=60,
            init_method=f"file://{folder}/store{expert}",
            rank=rank,
            world_size=world,
        )
        for data, chunks in (("replicate", 1), ("replicate", 3), ("shard", 1)):
            for routing in ROUTINGS if chunks == 1 else ("natural", "empty_rank"):
                case = f"{expert}x{world // expert}-{data}-{chunks}-{routing}"
                found[case] = errors(
                    rank,
                    world,
                    mesh,
                    routing,
                    expected[routing],
                    data=data,
                    num_chunks=chunks,
                )
        finish_parallel()
    write(folder, rank, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
