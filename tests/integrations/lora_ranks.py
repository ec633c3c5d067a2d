"""What each rank of `test_sharded_lora.py` runs: `lora_ranks.py FOLDER RANK`.

Rank 0 writes found.json: errors beside one process, and texts of refusals.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from lora_models import build, fill
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from unimoe_kernels import (
    MoE,
    add_expert_lora,
    load_expert_lora,
    merge_expert_lora,
    pack_weights,
    save_expert_lora,
    unstack_experts,
    upcycle,
)
from unimoe_kernels.distributed import parallelize_moe, save_weights

WORLD = 2


class Layer(torch.nn.Module):
    """A host of one MoE layer, for what transformers' models are too large for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.moe = MoE(8, 12, 4, 2, dtype=torch.float64)

    def forward(self, x):
        return self.moe(x)


def tuned(model):
    add_expert_lora(model, r=3, alpha=6)
    fill(model)
    return model


def sharded(kind, model, mesh):
    if kind == "fully_shard":
        for module in model.modules():
            if getattr(module, "expert_lora", None) is not None:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    parallelize_moe(model, init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("dp", "ep")))
    return model


def same_files(first, second):
    """Whether two adapter folders hold the same."""
    config = [json.loads((f / "adapter_config.json").read_text()) for f in (first, second)]
    weights = [load_file(f / "adapter_model.safetensors") for f in (first, second)]
    return config[0] == config[1] and all(
        torch.equal(weights[0][key], weights[1][key]) for key in weights[0].keys() | weights[1]
    )


def refused(function):
    try:
        function()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def files(folder, rank, mesh):
    """Of sharded models, beside those that one process writes."""
    found = {}
    cases = {"mixtral": ["fully_shard"], "layer": ["fully_shard", "parallelize_moe"]}
    for name, kinds in cases.items():
        make = Layer if name == "layer" else (lambda: build("mixtral"))
        alone = folder / f"{name}-{rank}"
        save_expert_lora(tuned(make()), alone)
        for kind in kinds:
            model = sharded(kind, tuned(make()), mesh)
            save_expert_lora(model, folder / f"{name}-{kind}")
            found[f"{name}, {kind}"] = same_files(alone, folder / f"{name}-{kind}")
    return found


def merged_weights(folder, rank, mesh):
    """Merged on two ranks, saved whole and read by one process: is it known to be merged?"""
    model = sharded("parallelize_moe", tuned(Layer()), mesh)
    merge_expert_lora(model)
    save_weights(model, folder / "merged.safetensors")
    alone = tuned(Layer())
    x = torch.randn(5, 8, dtype=torch.float64)
    expected = alone(x)
    alone.load_state_dict(load_file(folder / "merged.safetensors"))
    error = (alone(x) - expected).abs().max().item()
    return [error, alone.moe.experts.expert_lora.is_merged]


def merged_halves(mesh):
    """LoRA of the two halves of gate_up_proj, merged into weights sharded along experts or rows."""
    targets = ("gate_proj", "up_proj", "down_proj")
    found = []
    for dim in (0, 1):
        alone, model = (add_expert_lora(Layer(), r=4, target=targets) for _ in range(2))
        fill(alone)
        fill(model)
        merge_expert_lora(alone)
        placement = Shard(dim)
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda _, p=placement: p)
        text = refused(lambda model=model: merge_expert_lora(model))
        experts, expected = model.moe.experts, alone.moe.experts
        errors = [
            (getattr(experts, name).full_tensor() - getattr(expected, name)).abs().max().item()
            for name in ("gate_up_proj", "down_proj")
        ]
        found.append([text, max(errors), experts.expert_lora.is_merged])
    return found


def refusals(folder, mesh):
    """Of LoRA that comes after weights are sharded or replicated."""
    found = {}
    for kind in ("fully_shard", "parallelize_moe"):
        model = sharded(kind, Layer(), mesh)
        found[f"add after {kind}"] = refused(lambda model=model: add_expert_lora(model, r=3))
        found[f"load after {kind}"] = refused(
            lambda model=model: load_expert_lora(model, folder / "layer-0")
        )
        found[f"unchanged by {kind}"] = str(model.moe.experts.expert_lora is None)
        found[f"layer after {kind}"] = refused(lambda model=model: model.moe.experts.add_lora(3))
        experts = model.moe.experts
        for name, read in {
            "pack_weights": lambda model=model: pack_weights(model.moe),
            "from_moe": lambda model=model: model.moe.to_looped(),
            "unstack_experts": lambda e=experts: unstack_experts(e.gate_up_proj, e.down_proj),
        }.items():
            found[f"{name} after {kind}"] = refused(read)
    dense = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_attention_heads=1,
            num_hidden_layers=1,
        )
    )
    fully_shard(dense, mesh=mesh)
    found["upcycle after fully_shard"] = refused(lambda: upcycle(dense, num_experts=2))
    replicated = DistributedDataParallel(Layer())
    found["add after DistributedDataParallel"] = refused(lambda: add_expert_lora(replicated, r=3))
    return found


def failed_write(folder, mesh):
    """Rank 0 cannot write: all ranks are told."""
    model = sharded("parallelize_moe", tuned(Layer()), mesh)
    (folder / "file").touch()
    try:
        save_expert_lora(model, folder / "file" / "adapter")
    except (OSError, RuntimeError) as error:
        return type(error).__name__
    return "no error"


def main(folder, rank):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    found = {"files": files(folder, rank, mesh), "merged": merged_weights(folder, rank, mesh)}
    found["halves"] = merged_halves(mesh)
    found["refusals"] = refusals(folder, mesh)
    failures = [None] * WORLD
    dist.all_gather_object(failures, failed_write(folder, mesh))
    if rank == 0:
        found["failures"] = failures
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
