"""What the scenarios of `op_ranks.py` have in common: a rank among others, and a layer."""

import itertools

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from unimoe_kernels import MoE

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


def gathered(value, r):
    values = [None] * r.world
    dist.all_gather_object(values, value)
    return values


def layer(r, seed=0, dtype=torch.float64, **options):
    """A layer with weights of order one, and this rank's tokens."""
    torch.manual_seed(seed)
    moe = MoE(D, F, E, K, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    torch.manual_seed(100 + r.rank)
    return moe, torch.randn(5 + 3 * r.rank, D, dtype=dtype)
