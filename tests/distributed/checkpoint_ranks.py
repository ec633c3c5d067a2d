"""Ranks of `test_checkpoint.py`: train and save at 2 x 2, or load at other sizes and compare."""

import sys
from pathlib import Path

import torch
from launcher import write
from small_model import SmallModel, batch, loss_of

from unimoe_kernels.distributed import (
    count_over_ranks,
    finish_parallel,
    load_sharded,
    load_weights,
    parallelize_moe,
    parameter_groups,
    save_sharded,
    save_weights,
    start_parallel,
    unparallelize_moe,
    whole_state_dict,
)

STEPS = 3


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def contents(model, optimizer):
    """Everything that a checkpoint holds, in one piece on every rank."""
    found = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            found[f"{key} of {names[parameter]}"] = whole(value)
    return found


def built(mesh, data, seed=None, device="cpu"):
    model = SmallModel().to(device)
    if seed is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(seed))
    parallelize_moe(model, mesh, data=data)
    return model, torch.optim.AdamW(parameter_groups(model.parameters()), lr=1e-2)


def trained(mesh, rank, data):
    model, optimizer = built(mesh, data)
    for step in range(STEPS):
        inputs = batch(rank, step, "natural")
        optimizer.zero_grad()
        loss_of(model, inputs, count_over_ranks((inputs[2] >= 0).sum(), mesh))[0].backward()
        optimizer.step()
    return model, optimizer


def same(actual, expected):
    assert actual.keys() == expected.keys()
    return all(torch.equal(actual[key], value) for key, value in expected.items())


def save(folder, rank, mesh):
    for data in ("replicate", "shard"):
        model, optimizer = trained(mesh, rank, data)
        save_sharded(folder / data, model, [optimizer], {"step": STEPS})
        save_weights(model, folder / f"{data}.safetensors")
        expected = contents(model, optimizer)
        gathered = whole_state_dict(model)
        assert bool(gathered) == (rank == 0)
        if rank == 0:
            torch.save(expected, folder / f"{data}.expected")


def load(folder, mesh, data):
    """Whether what either way of saving wrote comes back, held in the way `data`."""
    results = {}
    for saved in ("replicate", "shard"):
        expected = torch.load(folder / f"{saved}.expected")
        model, optimizer = built(mesh, data, seed=5)
        extra = load_sharded(folder / saved, model, [optimizer])
        assert extra == {"step": STEPS}
        results[f"{saved} to {data}"] = same(contents(model, optimizer), expected)
        weights = {name: value for name, value in expected.items() if " of " not in name}
        # Built without memory: no rank ever holds all experts.
        model, _ = built(mesh, data, device="meta")
        load_weights(model, folder / f"{saved}.safetensors")
        found = {name: whole(tensor) for name, tensor in model.state_dict().items()}
        results[f"{saved} safetensors to {data}"] = same(found, weights)
        if data == "replicate":
            unparallelize_moe(model)
            assert not any(hasattr(p, "full_tensor") for p in model.parameters())
            results[f"{saved} together again"] = same(model.state_dict(), weights)
    return results


def main(folder, rank, world, *layouts):
    torch.set_num_threads(1)
    results = {}
    for expert in map(int, layouts):
        mesh = start_parallel(
            world // expert,
            expert,
            timeout=60,
            init_method=f"file://{folder}/store-{world}-{expert}",
            rank=rank,
            world_size=world,
        )
        if world == 4 and expert == 2:
            save(folder, rank, mesh)
        for data in ("replicate", "shard"):
            for what, equal in load(folder, mesh, data).items():
                results[f"{expert}x{world // expert}: {what}"] = equal
        finish_parallel()
    write(folder, rank, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
