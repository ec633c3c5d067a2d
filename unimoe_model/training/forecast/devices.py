"""Memory of one of several devices, from the simulated step of one."""

from dataclasses import dataclass

import numpy as np

from unimoe_model.training.forecast.allocations import KINDS
from unimoe_model.training.forecast.step import Step

RESERVED = 0.08
"""Share of a device's memory that is kept free: its context, libraries, and fragmentation."""


@dataclass(frozen=True)
class Layout:
    """How a model lies on devices.

    Attributes:
        devices: how many there are; all have samples of their own.
        expert: devices that share the experts.
        shard: whether weights, gradients and optimiser states are divided over all devices (FSDP),
            and one decoder layer at a time is gathered; else all devices hold them whole.
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
    """Bytes of each of `KINDS` on one device, at the moment of the most.

    Experts, what belongs to them and copies of them in another dtype are divided by
    `layout.expert`; the same number of rows is assumed to reach every device. `layout.shard`
    divides weights, gradients and optimiser states by the number of devices. To these come the
    gathered weights of two decoder layers (one is fetched ahead) and of all that is outside them,
    and the gradients of a layer before and while they are scattered. Without it the devices add up
    gradients of whole weights, which are held twice then and, when the backward ends, a third time
    to travel (`GradientSum`); one time more where a batch has several parts.

    Args:
        step: of a device; with experts on several, one that was simulated as `dispatched`.
        rows: of the part of a batch that goes through a device at once.
        layout: of the devices.
        has_parts: whether a batch has several parts, whose gradients are added up.
    """
    live = step.live(rows)
    weights, gradients, states = (KINDS.index(n) for n in ("weights", "gradients", "optimizer"))
    if has_parts:
        # Each gradient of a later part is there beside all of the parts before.
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
    """The most rows of a batch's `rows` that fit at once into `limit` bytes; 0 if none does."""
    fits, fails = 0, rows + 1
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if sum(peak(step, middle, layout, middle < rows).values()) <= limit:
            fits = middle
        else:
            fails = middle
    return fits


def layouts(devices: int, num_experts: int) -> list[Layout]:
    """Layouts of so many devices: data parallel, experts on as many as share them, sharded."""
    share = max(n for n in range(1, devices + 1) if not devices % n and not num_experts % n)
    shares = [1] if share == 1 or not num_experts else [1, share]
    sharded = [False] if devices == 1 else [False, True]
    return [Layout(devices, expert, shard) for shard in sharded for expert in shares]
