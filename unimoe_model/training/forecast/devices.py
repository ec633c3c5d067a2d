"""Memory per device of several devices, derived from the simulated step of one."""

from dataclasses import dataclass

import numpy as np

from unimoe_model.training.forecast.allocations import KINDS
from unimoe_model.training.forecast.step import Step

RESERVED = 0.08
"""Share of a device's memory reserved for its context, libraries and fragmentation."""


@dataclass(frozen=True)
class Layout:
    """How a model is distributed over devices.

    Attributes:
        devices: number of devices, each with its own samples.
        expert: number of devices that share the experts.
        shard: whether weights, gradients and optimiser states are sharded over all devices (FSDP2)
            and gathered one decoder layer at a time; otherwise they are replicated.
    """

    devices: int = 1
    expert: int = 1
    shard: bool = False

    def __str__(self) -> str:
        parts = [f"data {self.devices // self.expert}"]
        if self.expert > 1:
            parts.append(f"expert {self.expert}")
        return " x ".join(parts) + (", sharded" if self.shard else "")


def peak(step: Step, rows: float, layout: Layout, has_parts: bool) -> dict[str, float]:
    """Bytes of each of `KINDS` on one device at peak memory.

    Experts, their gradients and states, and copies of them in another dtype are divided by
    `layout.expert`; all devices are assumed to receive the same number of rows. `layout.shard`
    divides weights, gradients and optimiser states by the number of devices, and adds the gathered
    weights of two decoder layers (one is prefetched) and of everything outside of them, and the
    gradients of a layer before and while they are scattered. Without `shard`, gradients are held
    twice and, at the end of the backward, a third time while they are summed (`GradientSum`); one
    more time if a batch has several parts.

    Args:
        step: simulated step of a device; with split experts, one simulated as `dispatched`.
        rows: number of rows of a part of the batch on one device.
        layout: layout of the devices.
        has_parts: whether gradients of several parts are accumulated.

    Returns:
        Bytes by kind.
    """
    live = step.live(rows)
    weights, gradients, states = (KINDS.index(n) for n in ("weights", "gradients", "optimizer"))
    if has_parts:
        # The gradient of a later part exists beside the accumulated ones.
        live[:, gradients] = live[:, gradients].max(0)
        live[:, gradients, 0] += step.largest
    live[:, :, 1] /= layout.expert
    if layout.shard:
        divided = layout.devices / np.array([1, layout.expert])
        live[:, [weights, gradients, states]] /= divided
        (layer, layer_experts), (trained, trained_experts) = step.layer
        live[:, weights, 0] += step.outside + 2 * (layer + layer_experts / layout.expert)
        live[:, gradients, 0] += 2 * (trained + trained_experts / layout.expert)
    elif layout.devices > 1:
        held = 2 + has_parts
        end = live[-1:].copy()
        end[:, gradients] = (held + 1) * live[:, gradients].max(0)
        live[:, gradients] *= held
        live = np.concatenate([live, end])
    most = live[live.sum((1, 2)).argmax()].sum(1)
    return dict(zip(KINDS, most.tolist(), strict=True))


def most_rows(step: Step, layout: Layout, limit: float, rows: int) -> int:
    """The largest number of a batch's `rows` per part that fits into `limit` bytes; 0 if none."""
    fits, fails = 0, rows + 1
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if sum(peak(step, middle, layout, middle < rows).values()) <= limit:
            fits = middle
        else:
            fails = middle
    return fits


def layouts(devices: int, num_experts: int) -> list[Layout]:
    """Layouts for a number of devices: replicated and sharded, each with and without split experts.

    Experts are split over the largest common divisor of `devices` and `num_experts`.
    """
    share = max(n for n in range(1, devices + 1) if not devices % n and not num_experts % n)
    shares = [1] if share == 1 or not num_experts else [1, share]
    sharded = [False] if devices == 1 else [False, True]
    return [Layout(devices, expert, shard) for shard in sharded for expert in shares]
