"""`MoE` in a plain torch model that classifies eight sine waves from 32 noisy samples.

Run it: python examples/drop_in.py
"""

import argparse

import torch
from torch import nn

from unimoe_kernels import MoE

CLASSES, SAMPLES = 8, 32


class Classifier(nn.Module):
    """A classifier with one mixture-of-experts layer in place of an FFN."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.project = nn.Linear(SAMPLES, width)
        self.norm = nn.RMSNorm(width)
        self.moe = MoE(width, 2 * width, num_experts=4, top_k=2, load_balancing_coef=0.01)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns logits `[T, CLASSES]` and the auxiliary loss."""
        x = self.project(x)
        y, routed = self.moe(self.norm(x), return_router=True)
        return self.head(x + y), self.moe.aux_loss_of(routed)


def batch(size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns noisy sine waves `[size, SAMPLES]` of 1 to CLASSES periods, and classes `[size]`."""
    label = torch.randint(CLASSES, (size,), generator=generator)
    phase = 6.28 * torch.rand(size, 1, generator=generator)
    time = torch.linspace(0, 6.28, SAMPLES)
    wave = torch.sin((label[:, None] + 1) * time + phase)
    return wave + 0.5 * torch.randn(size, SAMPLES, generator=generator), label


def main(steps: int) -> float:
    """Trains the classifier and returns its accuracy on new waves."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        x, label = batch(256, generator)
        logits, aux_loss = model(x)
        loss = nn.functional.cross_entropy(logits, label) + aux_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, steps // 5) == 0:
            print(f"step {step:4}  loss {loss:.3f}")
    x, label = batch(4096, generator)
    with torch.no_grad():
        logits, _ = model(x)
        _, routed = model.moe(model.norm(model.project(x)), return_router=True)
    accuracy = (logits.argmax(1) == label).float().mean().item()
    print(f"accuracy {accuracy:.1%}, tokens of each expert {routed.tokens_per_expert.tolist()}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    main(parser.parse_args().steps)
