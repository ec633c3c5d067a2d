"""LoRA on the stacked weights of experts: modules, and adding, merging and removing them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe_kernels.layers._inputs import check_positive, local_part
from unimoe_kernels.layers.quantized_projection import QuantizedProjection, quantized_parts
from unimoe_kernels.ops import grouped_lora

HALVES = ("gate_proj", "up_proj")
TARGETS = ("gate_up_proj", *HALVES, "down_proj")


class ExpertLoRA(nn.Module):
    """The low-rank correction of one projection of all experts: `scale * B[e] @ (A[e] @ x)`.

    A is initialised Kaiming uniform with a = sqrt(5) and B with zeros, so the initial correction
    is zero.

    Attributes:
        lora_A: `[E, r, in]` parameter.
        lora_B: `[E, out, r]` parameter.
        scale: `alpha / r`.
        dropout: dropout probability of the input in training.

    Args:
        num_experts: E.
        in_features: columns of the projection.
        out_features: rows of the projection.
        rank: r, at least 1.
        alpha: numerator of the scale.
        dropout: from 0 to below 1.
        device: device of the weights.
        dtype: dtype of the weights.

    Raises:
        ValueError: If a size is below 1 or dropout is out of range.

    Reference:
        LoRA, arXiv 2106.09685.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_experts=num_experts, r=rank)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout ({dropout}) must be at least 0 and below 1")
        options = {"device": device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(num_experts, rank, in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(num_experts, out_features, rank, **options))
        self.scale = alpha / rank
        self.dropout = dropout
        self.reset_parameters()

    @property
    def rank(self) -> int:
        """Rank r."""
        return self.lora_A.shape[1]

    def reset_parameters(self) -> None:
        """Reinitialises A and zeroes B."""
        # kaiming_uniform_ with a = sqrt(5) on each expert's matrix: bound 1 / sqrt(columns).
        bound = self.lora_A.shape[2] ** -0.5
        nn.init.uniform_(self.lora_A, -bound, bound)
        nn.init.zeros_(self.lora_B)

    def forward(self, rows: Tensor, expert_offsets: Tensor) -> Tensor:
        """Returns the correction of the projection's product, `[N, out]`.

        Args:
            rows: `[N, in]` in expert order.
            expert_offsets: `[E + 1]`, int32, as returned by `expert_sort`.
        """
        if self.training and torch.is_grad_enabled() and not self.lora_B.requires_grad:
            _warn_of_frozen()
        rows = F.dropout(rows, self.dropout, self.training)
        lora_A, lora_B = (local_part(w).to(rows.dtype) for w in (self.lora_A, self.lora_B))
        return grouped_lora(rows, lora_A, lora_B, expert_offsets, self.scale)

    def extra_repr(self) -> str:
        """Returns the options shown by `print(module)`."""
        return f"r={self.rank}, scale={self.scale}, dropout={self.dropout}"


class ExpertLoRADict(nn.ModuleDict):
    """The LoRA of one experts module: an `ExpertLoRA` for each target, by name.

    The buffer `merged` records in the state dict whether the weights include the LoRA, so that
    loading never adds it twice or leaves it out. A state dict without the buffer is treated as not
    merged.

    Attributes:
        merged: 0 or 1, a uint8 scalar.
    """

    def __init__(self, loras: Mapping[str, ExpertLoRA]) -> None:
        super().__init__(loras)
        device = next(iter(loras.values())).lora_A.device
        self.register_buffer("merged", torch.zeros((), dtype=torch.uint8, device=device))
        self._is_merged = False
        self._seen: tuple[Tensor, int] | None = None

    @property
    def is_merged(self) -> bool:
        """Whether the weights include the LoRA.

        The buffer is read only if it was written or replaced since the last read, so that forwards
        do not synchronise with its device.
        """
        buffer = self.merged
        if torch.compiler.is_compiling() or buffer.is_meta:
            return self._is_merged
        version = 0 if buffer.is_inference() else buffer._version
        if self._seen is None or self._seen[0] is not buffer or self._seen[1] != version:
            self._is_merged, self._seen = bool(buffer), (buffer, version)
        return self._is_merged

    @is_merged.setter
    def is_merged(self, value: bool) -> None:
        self._is_merged, self._seen = value, None
        with torch.no_grad():
            self.merged.fill_(value)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        key = f"{prefix}merged"
        if key not in state_dict:
            experts = prefix.removesuffix("expert_lora.")
            touched = any(name.startswith(experts) for name in state_dict)
            value = torch.zeros_like(self.merged) if touched else self.merged
            state_dict = {**state_dict, key: value}
        super()._load_from_state_dict(state_dict, prefix, *args)
        # Read now, because code traced by torch.compile cannot read the buffer.
        self.refresh()

    def refresh(self) -> None:
        """Reads the buffer after it was written in place; required before a compiled forward."""
        self._seen = None  # the version of an inference tensor does not count
        _ = self.is_merged

    def unimoe_after_load(self) -> None:
        """Called by `load_sharded`, which knows no layers, after it wrote tensors in place."""
        self.refresh()

    def correct_first(self, hidden: Tensor, rows: Tensor, expert_offsets: Tensor) -> Tensor:
        """Adds the corrections of `gate_up_proj`, or of its two halves, to its product `[N, 2F]`.

        Args:
            hidden: `[N, 2F]`, the product.
            rows: `[N, D]`, the input of the projection, in expert order.
            expert_offsets: `[E + 1]`, int32.
        """
        if "gate_up_proj" in self:
            return hidden + self["gate_up_proj"](rows, expert_offsets)
        halves = {name: self[name](rows, expert_offsets) for name in HALVES if name in self}
        if not halves:
            return hidden
        zeros = hidden.new_zeros(hidden.shape[0], hidden.shape[1] // 2)
        return hidden + torch.cat([halves.get(name, zeros) for name in HALVES], dim=1)

    def correct_down(self, out: Tensor, rows: Tensor, expert_offsets: Tensor) -> Tensor:
        """Adds the correction of `down_proj` to its product `[N, D]`; `rows` is `[N, F]`."""
        if "down_proj" not in self:
            return out
        return out + self["down_proj"](rows, expert_offsets)


def refresh_lora(model: nn.Module) -> None:
    """Reads the buffers `merged` of a model after they were written in place."""
    for module in model.modules():
        if isinstance(module, ExpertLoRADict):
            module.refresh()


def _warn_of_frozen() -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(
            "expert LoRA is in training mode but frozen, for example because peft was applied"
            " later: call train_expert_lora(model) to train it",
            stacklevel=2,
        )


def check_attachable(experts: nn.Module, name: str = "experts") -> None:
    """Raises RuntimeError if experts already have LoRA or their weights are sharded.

    LoRA added to sharded weights would differ between ranks, initially and in training, because
    its gradients are not reduced.
    """
    if getattr(experts, "expert_lora", None) is not None:
        raise RuntimeError(f"{name} already has LoRA; merge or remove it first")
    for key, weight in experts.named_parameters(recurse=False):
        if hasattr(weight, "full_tensor"):
            raise RuntimeError(
                f"{name}.{key} is sharded: LoRA of experts must be added or loaded before"
                " fully_shard, parallelize_moe or a distributed plan of transformers"
            )


def new_lora(
    experts: nn.Module, target: str, rank: int, alpha: float, dropout: float = 0.0
) -> ExpertLoRA:
    """Returns LoRA for one target of experts, on the device and in the dtype of its weight.

    Raises:
        ValueError: If the experts have no such weight, rank is below 1 or dropout is out of range.
    """
    num_experts, rows, columns = shape_of(experts, target)
    weight = _stacked(experts, target)
    like = {"device": weight.device, "dtype": weight.dtype}
    return ExpertLoRA(num_experts, columns, rows, rank, alpha, dropout, **like)


def attach(experts: nn.Module, loras: Mapping[str, ExpertLoRA]) -> None:
    """Adds unmerged LoRA to experts that pass `check_attachable`."""
    experts.expert_lora = ExpertLoRADict(loras).train(experts.training)


def detach(experts: nn.Module) -> None:
    """Removes the LoRA of experts; merged corrections remain in the weights."""
    experts.expert_lora = None


def merge(experts: nn.Module) -> None:
    """Adds the LoRA corrections of experts to their weights in place, rounding once."""
    _add_products(experts, 1.0)
    experts.expert_lora.is_merged = True


def unmerge(experts: nn.Module) -> None:
    """Undoes `merge`, up to rounding."""
    _add_products(experts, -1.0)
    experts.expert_lora.is_merged = False


def merge_and_unload(experts: nn.Module) -> None:
    """Merges the LoRA of experts, unless it is merged already, and removes it."""
    if not experts.expert_lora.is_merged:
        merge(experts)
    detach(experts)


def unmerged_lora(experts: nn.Module) -> ExpertLoRADict | None:
    """Returns the LoRA that a forward has to add, or None."""
    lora = experts._modules.get("expert_lora")
    return None if lora is None or lora.is_merged else lora


@torch.no_grad()
def merge_lora_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """Returns a weight with its low-rank correction added: `W + scale * B @ A`.

    The product is computed in float32 (float64 for float64 factors) and rounded once. Gradients
    are not recorded.

    Args:
        weight: `[..., out, in]`, floating point.
        lora_A: `[..., r, in]`.
        lora_B: `[..., out, r]`.
        scale: `alpha / r`; negative to subtract the correction.

    Returns:
        `[..., out, in]`, dtype of weight, in new memory.

    Reference:
        LoRA, arXiv 2106.09685.
    """
    wide = torch.float32 if torch.float64 not in (lora_A.dtype, weight.dtype) else torch.float64
    product = scale * (lora_B.to(wide) @ lora_A.to(wide))
    return (weight.to(wide) + product).to(weight.dtype)


def weight_of(experts: nn.Module, target: str) -> Tensor:
    """Returns the weight of a target, `[E, out, in]`: a view of one of the stacked weights.

    Raises:
        ValueError: If the experts have no such weight.
        RuntimeError: If the weight is quantised and so cannot be changed.
    """
    weight = _stacked(experts, target)
    if isinstance(weight, QuantizedProjection):
        raise RuntimeError(
            f"{target} of {type(experts).__name__} is quantised ({weight.format}): LoRA cannot be"
            " merged into it"
        )
    weight_EOI = weight.detach()
    if getattr(experts, "is_transposed", False):
        weight_EOI = weight_EOI.transpose(1, 2)
    return weight_EOI.chunk(2, dim=1)[HALVES.index(target)] if target in HALVES else weight_EOI


def shape_of(experts: nn.Module, target: str) -> tuple[int, int, int]:
    """Returns E, rows and columns of the weight of a target, quantised or not.

    Raises:
        ValueError: If the experts have no such weight.
    """
    weight = _stacked(experts, target)
    if not isinstance(weight, QuantizedProjection):
        return tuple(weight_of(experts, target).shape)
    num_experts, rows, columns = weight.shape
    return num_experts, rows // 2 if target in HALVES else rows, columns


def stacked_names(experts: nn.Module) -> list[str]:
    """Returns the names of the stacked weights and biases of experts, quantised ones last.

    Weights are in the order in which layers declare them, the down projection last, also if they
    were quantised in the order of a file.
    """
    quantized = sorted(quantized_parts(experts), key=lambda name: name == "down_proj")
    return [*(key for key, _ in experts.named_parameters(recurse=False)), *quantized]


def _stacked(experts: nn.Module, target: str) -> Tensor | QuantizedProjection:
    """Returns the stacked weight of a target, which may be one half of it."""
    weight = getattr(experts, "gate_up_proj" if target in HALVES else target, None)
    if weight is None:
        raise ValueError(f"target ({target}) is not a weight of {type(experts).__name__}")
    return weight


def _add_products(experts: nn.Module, sign: float) -> None:
    rows = 2 if getattr(experts, "is_transposed", False) else 1
    for target in experts.expert_lora:
        placements = getattr(_stacked(experts, target), "placements", ())
        if target in HALVES and any(one.is_shard(rows) for one in placements):
            # A half of such a weight is a copy.
            raise RuntimeError(
                f"LoRA of {target} cannot be merged into gate_up_proj that is sharded along its"
                " rows: merge it before fully_shard or parallelize_moe(data='shard')"
            )
    for target, lora in experts.expert_lora.items():
        weight_EOI = weight_of(experts, target)
        weight_EOI.copy_(merge_lora_weight(weight_EOI, lora.lora_A, lora.lora_B, sign * lora.scale))
