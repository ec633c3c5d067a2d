"""What each rank of `test_parallel.py` runs: `ranks.py FOLDER RANK`; rank 0 writes found.json.

Errors are relative to one process that runs eager experts on the whole batch.
"""

import copy
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import fully_shard
from transformers.distributed import DistributedConfig

import unimoe_kernels
from unimoe_kernels.testing import relative_error

WORLD = 2
LAYOUTS = {
    "tensor": {"tp_size": 2, "tp_plan": "auto"},
    "tensor and expert, all-to-all": {
        "tp_size": 2,
        "tp_plan": "auto",
        "ep_size": 2,
        "ep_implementation": "all_to_all",
    },
    "tensor and expert, all-reduce": {
        "tp_size": 2,
        "tp_plan": "auto",
        "ep_size": 2,
        "ep_implementation": "all_reduce",
    },
    "FSDP": {"fsdp_size": 2},
    "FSDP and expert": {"fsdp_size": 2, "ep_size": 2},
}
IDS = torch.arange(3, 25).reshape(2, 11)


def answers(folder, **options):
    """Logits of inference and training, and gradients of all parameters, whole."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        inference = model(IDS).logits
    out = model(IDS, labels=IDS)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {"inference": inference, "training": out.logits.detach()} | grads
    return {name: whole(value) for name, value in found.items()}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def transformers_errors(folder):
    expected = answers(folder, experts_implementation="eager")
    errors = {}
    for layout, config in LAYOUTS.items():
        actual = answers(
            folder,
            experts_implementation="unimoe",
            distributed_config=DistributedConfig(**config),
        )
        assert actual.keys() == expected.keys()
        errors[layout] = max(relative_error(actual[name], expected[name]) for name in expected)
    return errors


def fsdp_error(rank):
    """Of `MoE` under `fully_shard`, each rank with half of the batch."""
    torch.manual_seed(0)
    options = {"mode": "sparsemixer_renorm", "top_p": 0.7, "num_null_experts": 1}
    shared = {"num_shared_experts": 2, "shared_scores": "softmax"}
    alone = unimoe_kernels.MoE(16, 24, 4, 3, dtype=torch.float64, **options, **shared)
    for parameter in alone.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    sharded = copy.deepcopy(alone)
    fully_shard(sharded)
    # Gloo sums where FSDP2 asks it to average.
    sharded.set_force_sum_reduction_for_comms(True)
    x = torch.randn(2 * WORLD, 5, 16, dtype=torch.float64)
    expected = alone(x)
    expected.square().mean().backward()
    half = slice(2 * rank, 2 * rank + 2)
    y = sharded(x[half])
    y.square().mean().backward()
    errors = [relative_error(y, expected[half])]
    for own, other in zip(sharded.parameters(), alone.parameters(), strict=True):
        assert not own.is_meta
        assert own.placements[0].is_shard()
        errors.append(relative_error(own.grad.full_tensor(), other.grad))
    return max(errors)


class AddsInPlace(torch.nn.Module):
    """A host's residual connection, which changes what its layer returned."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(x)
        y += x
        return y


def in_place_error(build):
    """Of the gradient of a `[T, D]` input: sharded layer and host, beside the same whole."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(8, 8), AddsInPlace(build()), torch.nn.Linear(8, 8)
    alone = torch.nn.Sequential(*layers).double()
    sharded = copy.deepcopy(alone)
    fully_shard(sharded[1].layer)
    fully_shard(sharded)
    grads = []
    for model in (alone, sharded):
        x = torch.linspace(-2, 2, 40, dtype=torch.float64).view(5, 8).requires_grad_()
        model(x).square().sum().backward()
        grads.append(x.grad)
    return relative_error(grads[1], grads[0])


def in_place_errors():
    injected = {"aux_loss": "inject", "load_balancing_coef": 0.1}
    return {
        "dense": in_place_error(lambda: unimoe_kernels.SwiGLUFFN(8, 8)),
        "MoE": in_place_error(lambda: unimoe_kernels.MoE(8, 8, 4, 2)),
        "injected loss": in_place_error(lambda: unimoe_kernels.MoE(8, 8, 4, 2, **injected)),
        "looped": in_place_error(lambda: unimoe_kernels.LoopedMoE(8, 8, 4, 2)),
    }


def main(folder, rank):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "LOCAL_WORLD_SIZE": str(WORLD),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD)
    unimoe_kernels.register_with_transformers()
    errors = transformers_errors(folder) | {
        "MoE under FSDP2": fsdp_error(rank),
        "changed in place": in_place_errors(),
    }
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(errors), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
