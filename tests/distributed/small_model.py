"""A small model with MoE layers, its batches for any number of ranks, and training steps."""

import torch
from torch import nn

from unimoe_kernels import MoE

D, F, E, K, V = 12, 16, 4, 2, 7
ROUTINGS = ("natural", "same", "empty_expert", "empty_rank")
MAX_NORM = 0.05


class Block(nn.Module):
    def __init__(self, moe):
        super().__init__()
        self.proj = nn.Linear(D, D, dtype=torch.float64)
        self.mlp = moe

    def forward(self, h, token_mask):
        h = h + self.proj(h).tanh()
        y, routed = self.mlp(h, token_mask, return_router=True)
        aux = self.mlp.aux_loss_of(routed) if self.mlp.aux_loss == "return" else 0.0
        return h + y, aux


class SmallModel(nn.Module):
    """Two MoE layers between linear maps, one of either way to use the auxiliary losses.

    The first feature of every token is large, so that a router's first column decides where all
    tokens go: to the same K experts, or past one of them.
    """

    def __init__(self, routing="natural"):
        super().__init__()
        common = {"dtype": torch.float64, "load_balancing_coef": 0.3, "router_z_coef": 0.05}
        self.embed = nn.Linear(D, D, dtype=torch.float64)
        self.layers = nn.ModuleList(
            [
                Block(MoE(D, F, E, K, bias=True, **common)),
                Block(
                    MoE(
                        D,
                        F,
                        E,
                        K,
                        mode="sigmoid_renorm",
                        aux_loss="inject",
                        num_shared_experts=1,
                        shared_scores="sigmoid",
                        **common,
                    )
                ),
            ]
        )
        self.unused = nn.Linear(D, D, dtype=torch.float64)
        self.sometimes = nn.Linear(D, D, dtype=torch.float64)
        self.head = nn.Linear(D, V, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                scale = 1.5 * parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator).double() * scale)
            for layer in self.layers:
                if routing == "same":
                    layer.mlp.router.weight[:K, 0] += 9
                if routing == "empty_expert":
                    layer.mlp.router.weight[-1, 0] -= 9

    def forward(self, x, token_mask, second=None):
        """`x` `[T, D]`; `second` is rows and what is added there, by a part that not all need."""
        h = self.embed(x)
        if second is not None:
            h = h.index_add(0, second[0], self.sometimes(second[1]))
        h = torch.cat([torch.full_like(h[:, :1], 4.0), h[:, 1:]], dim=1)
        aux = 0.0
        for layer in self.layers:
            h, layer_aux = layer(h, token_mask)
            aux = aux + layer_aux
        return self.head(h), aux


def batch(rank, step, routing):
    """What a rank gets at a step: features, mask, labels (-1: none), and a second input or None."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens = 0 if routing == "empty_rank" and rank == 0 else 9 + 4 * rank
    x = torch.randn(tokens, D, generator=generator, dtype=torch.float64)
    mask = torch.rand(tokens, generator=generator) < 0.8
    labels = torch.randint(V, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.3 + 0.1 * rank] = -1
    second = torch.randn(tokens, D, generator=generator, dtype=torch.float64)
    return x, mask, labels, (torch.arange(tokens), second) if (rank + step) % 2 else None


def joined(world, step, routing):
    """The batches of all ranks as one."""
    parts = [batch(rank, step, routing) for rank in range(world)]
    x, mask, labels = (torch.cat([part[i] for part in parts]) for i in range(3))
    starts = torch.tensor([0, *(len(part[0]) for part in parts)]).cumsum(0)
    seconds = [(part[3], start) for part, start in zip(parts, starts, strict=False) if part[3]]
    rows = torch.cat([second[0] + start for second, start in seconds])
    return x, mask, labels, (rows, torch.cat([second[1] for second, _ in seconds]))


def loss_of(model, inputs, count):
    """Cross-entropy summed over this rank's labels, over the count of all, plus auxiliary loss."""
    x, mask, labels, second = inputs
    logits, aux = model(x, mask, second)
    total = nn.functional.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return total / count + aux, logits
