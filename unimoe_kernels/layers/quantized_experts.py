"""All experts of a layer with quantised weights, with or without LoRA."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from unimoe_kernels.layers._inputs import check_width
from unimoe_kernels.layers.experts import GroupedExperts
from unimoe_kernels.layers.quantized_projection import QuantizedProjection, quantized_parts
from unimoe_kernels.ops import ExpertWeights
from unimoe_kernels.quantization.rounding import quantize_weight
from unimoe_kernels.quantization.weight import QuantizedWeight


class QuantizedExperts(GroupedExperts):
    """`GroupedExperts` with both stacked weights quantised and frozen.

    The quantised weights are buffers. Their state dict keys are `gate_up_proj.values`,
    `gate_up_proj.scales` and, with zero points, `gate_up_proj.zeros`; likewise for `down_proj`.
    Biases and LoRA remain parameters. The input may have any floating dtype; LoRA parameters have
    the dtype of the scales.

    The constructor fills the weights with zeros, to be loaded by `load_state_dict`.
    `quantize_experts` converts a trained layer.

    Attributes:
        gate_up_proj: `QuantizedProjection` `[E, 2F, D]`, gate rows first.
        down_proj: `QuantizedProjection` `[E, D, F]`.

    Args:
        num_experts: E, at least 1.
        hidden_size: D.
        intermediate_size: F.
        format: `"int8"` or `"int4"`.
        group_size: numbers along the sum that share a scale; None for the default of the format.
        zero_points: whether groups have zero points.
        **options: options of `GroupedExperts`; `dtype` is that of biases and scales.

    Raises:
        ValueError: See `GroupedExperts`; also if the format is unknown, or D or F is not a multiple
            of the group size.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        format: str = "int4",
        group_size: int | None = None,
        zero_points: bool = False,
        device: torch.device | str | None = None,
        lora_rank: int = 0,
        lora_alpha: float = 16,
        **options,
    ) -> None:
        sizes = (num_experts, hidden_size, intermediate_size)
        super().__init__(*sizes, device="meta", **options)
        quantize_in_place(self, ("gate_up_proj", "down_proj"), format, group_size, zero_points)
        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type != "meta":
            self.to_empty(device=device)
            for tensor in (*self.parameters(), *self.buffers()):
                nn.init.zeros_(tensor)
        if lora_rank > 0:
            self.add_lora(lora_rank, lora_alpha)

    @property
    def format(self) -> str:
        """The format of both weights."""
        return quantized_parts(self)["gate_up_proj"].format

    def reset_parameters(self) -> None:
        """Initialises the parameters, which is not possible once weights are quantised.

        Raises:
            RuntimeError: If weights are quantised.
        """
        if quantized_parts(self):
            raise RuntimeError(f"experts are quantised ({self.format}), they cannot be drawn anew")
        super().reset_parameters()

    def add_lora(
        self,
        rank: int,
        alpha: float = 16,
        *,
        freeze_base: bool = True,
        split_gate_up: bool = False,
    ) -> None:
        """Adds LoRA as `GroupedExperts.add_lora` does; it cannot be merged into the weights.

        Raises:
            ValueError: See `GroupedExperts.add_lora`; also if `freeze_base` is False.
        """
        if not freeze_base:
            raise ValueError("freeze_base (False) must be True: quantised weights are frozen")
        super().add_lora(rank, alpha, split_gate_up=split_gate_up)

    def _weights(self) -> ExpertWeights:
        parts = quantized_parts(self)
        first, down = parts["gate_up_proj"].weight, parts["down_proj"].weight
        return ExpertWeights(first, down, self.gate_up_bias, self.down_bias)

    def _check_hidden(self, x: torch.Tensor) -> None:
        check_width(x, self.gate_up_proj.device, self.hidden_size)

    def extra_repr(self) -> str:
        """What print(module) shows between the parentheses."""
        return f"{super().extra_repr()}, format={self.format!r}"


def quantize_in_place(
    experts: nn.Module,
    names: tuple[str, ...],
    format: str,
    group_size: int | None,
    zero_points: bool,
    quantize: Callable[[str, torch.Tensor], QuantizedWeight] | None = None,
) -> None:
    """Replaces stacked parameters of experts by `QuantizedProjection`, one after the other.

    The quantised weights are always `[E, out, in]`, also where transformers stores the parameters
    transposed (`is_transposed`). `quantize` replaces rounding to nearest; its arguments are the
    name of the parameter and its value `[E, out, in]`.
    """
    for name in names:
        weight_EOI = experts.get_parameter(name).detach()
        if getattr(experts, "is_transposed", False):
            weight_EOI = weight_EOI.transpose(1, 2)
        if quantize is not None:
            quantized = quantize(name, weight_EOI)
        else:
            quantized = quantize_weight(
                weight_EOI, format, group_size, zero_points=zero_points, name=name
            )
        delattr(experts, name)
        experts.add_module(name, QuantizedProjection(quantized))
