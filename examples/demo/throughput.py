"""Speed of the MoE layer, a dense FFN and the published loop, in one interleaved run."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from unimoe_kernels import MoE, SwiGLUFFN


def layer_throughput(
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int = 9,
) -> dict[str, dict[str, float]]:
    """Times one MoE layer, the loop it replaces, and a dense FFN that does the same FLOPs.

    Every round runs all three on the same random tokens, so that disturbances affect all of them.
    The looped layer has the weights of the MoE layer; their outputs are compared first.

    Args:
        hidden_size: D.
        intermediate_size: F of one expert; the dense FFN has `top_k * F`.
        num_experts: E.
        top_k: K.
        tokens: T.
        device: device to run on.
        dtype: dtype of weights and tokens.
        rounds: number of timed rounds, after three warm-up rounds.

    Returns:
        For `moe`, `looped` and `dense`: median milliseconds `forward` and `step` (forward and
        backward), and tokens/s of a step.

    Raises:
        RuntimeError: If the MoE layer and the loop disagree.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden_size, generator=generator).to(device, dtype)
    moe = MoE(hidden_size, intermediate_size, num_experts, top_k).to(device, dtype)
    layers: dict[str, nn.Module] = {
        "moe": moe,
        "looped": moe.to_looped(),
        "dense": SwiGLUFFN(hidden_size, top_k * intermediate_size).to(device, dtype),
    }
    with torch.no_grad():
        got, expected = layers["moe"](x).double(), layers["looped"](x).double()
    error = ((got - expected).norm() / expected.norm()).item()
    if not error < (1e-5 if dtype == torch.float32 else 3e-2):
        raise RuntimeError(f"MoE and LoopedMoE differ by a relative error of {error:.2e}")
    times = {name: {"forward": [], "step": []} for name in layers}
    for _ in range(rounds + 3):
        for name, layer in layers.items():
            times[name]["forward"].append(_milliseconds(lambda m=layer: _forward(m, x), device))
            times[name]["step"].append(_milliseconds(lambda m=layer: _step(m, x), device))
    return {
        name: {
            "forward_ms": statistics.median(taken["forward"][3:]),
            "step_ms": statistics.median(taken["step"][3:]),
            "tokens_per_s": tokens / statistics.median(taken["step"][3:]) * 1000,
        }
        for name, taken in times.items()
    }


def _forward(layer: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        layer(x)


def _step(layer: nn.Module, x: torch.Tensor) -> None:
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_(True)
    y = layer(x)
    y.backward(torch.ones_like(y))


def _milliseconds(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1000
