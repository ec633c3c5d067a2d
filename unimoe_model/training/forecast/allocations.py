"""Tracks the memory of fake tensors, operator by operator."""

import weakref
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unimoe_model.training.forecast.layers import LayerBlocks

KINDS = ("weights", "gradients", "optimizer", "activations")
"""Uses of memory. Activations are everything else, temporaries included."""
_LARGEST_REAL = 1 << 24
"""Maximum number of elements of a tensor that is computed for real."""
_COMPOSED = frozenset(
    f"unimoe.{name}{direction}.reference"
    for name in ("moe_mlp", "grouped_lora")
    for direction in ("", "_backward")
)
"""Operators composed of others, whose temporaries are counted."""
_CPU = torch.device("cpu")
_CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class AllocationLog(TorchDispatchMode):
    """Dispatch mode that runs operators on fake tensors and logs the life of their storages.

    Fake tensors have shapes but no memory. Tensors that do not depend on fake ones, such as token
    ids and labels, are computed unless they are large, so that values read from them are correct.
    Values read from fake tensors are zero.

    Attributes:
        events: number of a storage, counted from 1, at its allocation, and its negative at its
            release.
    """

    def __init__(self):
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._live: dict[int, int] = {}
        self._bytes: list[int] = []
        self._kinds: list[tuple[int, bool]] = []
        self._copies: set[int] = set()
        self.events: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs an operator and logs its allocations."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        is_fake = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        if func is torch.ops.aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype).item() if is_fake else func(*args)
        if str(func) in _COMPOSED:
            with self:
                return func.redispatch(_CPU_KEYS, *args, **kwargs)
        if func is torch.ops.aten.index.Tensor and is_fake:
            args = (args[0], _places(args[1]))
        output = self._run(func, types, args, kwargs, is_fake)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        if func is torch.ops.aten._to_copy.default:
            self._copied(args[0], output)
        return output

    def materialize(self, model: nn.Module) -> None:
        """Replaces weights of a model on the meta device by fake ones, and buffers by zeros.

        Tied weights stay tied.
        """
        made: dict[int, nn.Parameter] = {}
        for part in model.modules():
            for name, own in part._parameters.items():
                if own is not None:
                    if id(own) not in made:
                        fake = FakeTensor(self._fake, own.detach(), _CPU)
                        made[id(own)] = nn.Parameter(fake, own.requires_grad)
                        self._add(made[id(own)])
                    part._parameters[name] = made[id(own)]
            for name, own in part._buffers.items():
                if own is not None:
                    part._buffers[name] = torch.zeros_like(own, device=_CPU)

    def empty(self, *shape: int) -> Tensor:
        """Creates a fake float32 tensor on the CPU."""
        made = FakeTensor(self._fake, torch.empty(shape, device="meta"), _CPU)
        self._add(made)
        return made

    def mark(self, tensors: Iterable[Tensor], kind: str, of_experts: bool = False) -> None:
        """Sets the use of tensors' memory, one of `KINDS`, for their whole life."""
        for tensor in tensors:
            number = self._live.get(tensor.untyped_storage()._cdata)
            if number is not None:
                self._kinds[number] = (KINDS.index(kind), of_experts)

    def forget(self) -> None:
        """Restarts the log with the tensors that are live now."""
        self.events = [number + 1 for number in self._live.values()]

    def timeline(
        self, rows: int, prime: int, blocks: LayerBlocks | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Live bytes after each event of the log.

        Args:
            rows: number of rows of the batch.
            prime: a prime factor of `rows` that divides no other size, so that sizes divisible by
                it grow with the batch.
            blocks: repeats the events of layers that were not simulated.

        Returns:
            Bytes independent of the batch, and bytes per row of the batch, `[events, kinds, 2]`
            float64 each. Kinds are in the order of `KINDS`; the last dimension is without experts,
            and of experts.
        """
        events = np.array(self.events)
        number = np.abs(events) - 1
        size = np.array(self._bytes)[number]
        kind, of_experts = np.array(self._kinds).T[:, number]
        grows = (size % prime == 0) & (kind == KINDS.index("activations"))
        change = np.zeros((len(events), 2, len(KINDS), 2))
        change[np.arange(len(events)), grows.astype(int), kind, of_experts] = (
            np.sign(events) * size / np.where(grows, rows, 1)
        )
        if blocks is not None:
            made = np.zeros(len(self._bytes), int)
            made[number[events > 0]] = np.flatnonzero(events > 0)
            is_copy = np.isin(number, list(self._copies))
            change = blocks.repeat(change, made[number], is_copy)
        fixed, per_row = np.moveaxis(change.cumsum(0), 1, 0)
        return fixed, per_row

    def _run(self, func, types, args, kwargs, is_fake: bool):
        if is_fake:
            return self._fake.__torch_dispatch__(func, types, args, kwargs)
        try:
            output = self._fake.__torch_dispatch__(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return func(*args, **kwargs)
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        return func(*args, **kwargs) if max(sizes, default=0) <= _LARGEST_REAL else output

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or not storage.nbytes():
            return
        number = len(self._bytes)
        self._live[key] = number
        self._bytes.append(storage.nbytes())
        self._kinds.append((KINDS.index("activations"), False))
        self.events.append(number + 1)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.events.append(-1 - self._live.pop(key))

    def _copied(self, source: Tensor, copy: Tensor) -> None:
        """Records a copy of weights in another dtype; copies of experts are split like experts."""
        number = self._live.get(source.untyped_storage()._cdata)
        if number is None or self._kinds[number][0] != KINDS.index("weights"):
            return
        self._copies.add(self._live[copy.untyped_storage()._cdata])
        self.mark([copy], "activations", self._kinds[number][1])


def _places(indices) -> list[Tensor | None]:
    """Replaces bool masks in indices by the positions of True."""
    found: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool
        found += index.nonzero().unbind(1) if is_mask else [index]
    return found
