"""Layers with outputs of order one, so that an error shows and zeros cannot pass."""

import pytest
import torch

from unimoe_kernels import LoopedMoE


@pytest.fixture
def make_looped():
    """Returns a factory of LoopedMoE with weights drawn from a seed."""

    def make(
        hidden_size=12, intermediate_size=20, num_experts=4, top_k=2, dtype=torch.float32, seed=0
    ):
        looped = LoopedMoE(hidden_size, intermediate_size, num_experts, top_k, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in looped.parameters():
                values = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                weight.copy_(values * (2.0 / weight.shape[1] ** 0.5))
        return looped

    return make


@pytest.fixture
def randn():
    """Returns torch.randn with a generator of its own, seeded for each test."""
    generator = torch.Generator().manual_seed(1234)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw
