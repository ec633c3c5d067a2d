"""Calibration: runs a model on inputs and records the rows that each layer's experts receive."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unimoe_kernels.layers.expert_lora import unmerged_lora
from unimoe_kernels.quantization.calibrated import quantize_weight_by_inputs
from unimoe_kernels.quantization.rounding import quantize_weight
from unimoe_kernels.quantization.weight import QuantizedWeight

FEWEST_ROWS = 16
"""Number of routed rows below which an expert's weights are rounded to nearest. With 16 correlated
rows the error on other inputs is 11 % lower than that of rounding to nearest, with 64 31 % (width
256)."""
# Numbers of weights and second moments of the experts that are calibrated at a time.
_CHUNK = 1 << 24

Named = Sequence[tuple[str, nn.Module]]


class Calibration:
    """Calibration inputs, checked by one forward of the float model.

    Args:
        model: a model with float experts that run on the operators of this package.
        found: names and modules of its experts.
        inputs: inputs of the model: mappings of keyword arguments, tuples of positional arguments,
            or single arguments.

    Attributes:
        order: the experts reached by the inputs, in the order in which a forward reaches them.

    Raises:
        ValueError: If `inputs` is empty, or the input or output of a layer of experts contains NaN
            or infinity.
        TypeError: If `inputs` is a single input or a string.
    """

    def __init__(self, model: nn.Module, found: Named, inputs: Iterable[Any]) -> None:
        if isinstance(inputs, (str, bytes, Mapping, Tensor)) or not isinstance(inputs, Iterable):
            raise TypeError(
                f"calibration ({type(inputs).__name__}) must be an iterable of inputs of the model,"
                " such as a list"
            )
        self._model = model
        self._inputs = list(inputs)
        if not self._inputs:
            raise ValueError("calibration must hold at least one input of the model")
        self._names = {experts: name for name, experts in found}
        self._few: dict[str, list[int]] = {}
        self.order = self._check()

    def rows_of(self, experts: nn.Module, pending: Iterable[nn.Module]) -> _Recorder:
        """Records the rows of `experts`. Each forward stops at the next of the pending experts."""
        recorder = _Recorder(unmerged_lora(experts))
        others = [one for one in pending if one is not experts]
        with _recording(experts, recorder), _stopping(others, recorder):
            for batch in self._inputs:
                recorder.reached = False
                try:
                    _call(self._model, batch)
                except _StopError:
                    continue
        return recorder

    def quantize(
        self,
        experts: nn.Module,
        name: str,
        weight: Tensor,
        rows: Sequence[tuple[Tensor, list[int]]],
        format: str,
        group_size: int | None,
        zero_points: bool,
    ) -> QuantizedWeight:
        """Quantises a stacked weight `[E, out, in]` with the recorded rows of each expert."""
        options = {"zero_points": zero_points, "name": name}
        result = quantize_weight(weight, format, group_size, **options)
        num_experts, out, width = weight.shape
        counts = [sum(o[e + 1] - o[e] for _, o in rows) for e in range(num_experts)]
        seen = [e for e in range(num_experts) if counts[e] >= FEWEST_ROWS]
        self._few[self._names[experts]] = [e for e in range(num_experts) if e not in set(seen)]
        at_once = max(1, _CHUNK // (width * (width + out)))
        for start in range(0, len(seen), at_once):
            chosen = seen[start : start + at_once]
            moments = torch.stack([_moments(rows, e) for e in chosen])
            part = quantize_weight_by_inputs(
                weight[chosen], moments, [counts[e] for e in chosen], format, group_size, **options
            )
            for whole, own in zip(result[:2], part[:2], strict=True):
                whole[chosen] = own
        return result

    def warn(self) -> None:
        """Issues one warning that names the experts with too few rows, if there are any."""
        unreached = [name for one, name in self._names.items() if one not in self.order]
        parts = [f"{name or 'experts'}: {few}" for name, few in self._few.items() if few]
        parts += [f"{name or 'experts'}: all" for name in unreached]
        if parts:
            warnings.warn(
                f"experts that saw fewer than {FEWEST_ROWS} rows of the calibration are rounded to"
                f" nearest: {'; '.join(parts)}",
                stacklevel=4,  # past no_grad, to the caller of quantize_experts
            )

    def _check(self) -> list[nn.Module]:
        order: dict[nn.Module, None] = {}
        number = 0

        def check(experts: nn.Module, inputs: tuple, output: Any = None) -> None:
            order.setdefault(experts)
            which = "inputs" if output is None else "outputs"
            tensor = inputs[0] if output is None else output
            if not tensor.isfinite().all():
                kind = "NaN" if tensor.isnan().any() else "infinity"
                name = self._names[experts] or "experts"
                raise ValueError(
                    f"calibration[{number}] gives {kind} in the {which} of {name}, which must be"
                    " finite"
                )

        hooks = [one.register_forward_pre_hook(check) for one in self._names]
        hooks += [one.register_forward_hook(check) for one in self._names]
        try:
            for number in range(len(self._inputs)):
                _call(self._model, self._inputs[number])
        finally:
            for hook in hooks:
                hook.remove()
        return list(order)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode within the context, so that no dropout or jitter changes the rows."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class _StopError(Exception):
    """Ends a forward before experts that are calibrated later."""


class _Recorder(nn.Module):
    """Replaces the LoRA of experts, whose methods receive the inputs of both projections.

    Attributes:
        first: for each call, the rows `[N, D]` in expert order, times their scores, and the expert
            offsets.
        down: likewise with rows `[N, F]`.
        reached: whether the experts were called in this forward.
    """

    is_merged = False

    def __init__(self, lora: nn.Module | None) -> None:
        super().__init__()
        self._lora: Any = lora
        self.first: list[tuple[Tensor, list[int]]] = []
        self.down: list[tuple[Tensor, list[int]]] = []
        self.reached = False
        self._scores: Tensor

    def route(self, _experts: nn.Module, inputs: tuple) -> None:
        """Stores the scores in expert order: rows are weighted by them, as expert outputs are."""
        _, ids, scores = inputs
        self.reached = True
        order = ids.flatten().sort(stable=True).indices
        self._scores = scores.flatten()[order].float().unsqueeze(1)

    def correct_first(self, out: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        """Records the inputs of the first projection and applies the replaced LoRA, if any."""
        self.first.append((rows.float() * self._scores, offsets.tolist()))
        return out if self._lora is None else self._lora.correct_first(out, rows, offsets)

    def correct_down(self, out: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        """Records the inputs of `down_proj` and applies the replaced LoRA, if any."""
        self.down.append((rows.float() * self._scores, offsets.tolist()))
        return out if self._lora is None else self._lora.correct_down(out, rows, offsets)


@contextmanager
def _recording(experts: nn.Module, recorder: _Recorder) -> Iterator[None]:
    had, before = "expert_lora" in experts._modules, experts._modules.get("expert_lora")
    experts._modules["expert_lora"] = recorder
    hook = experts.register_forward_pre_hook(recorder.route)
    try:
        yield
    finally:
        hook.remove()
        if had:
            experts._modules["expert_lora"] = before
        else:
            del experts._modules["expert_lora"]


@contextmanager
def _stopping(others: Iterable[nn.Module], recorder: _Recorder) -> Iterator[None]:
    def stop(_experts: nn.Module, _inputs: tuple) -> None:
        if recorder.reached:
            raise _StopError

    hooks = [one.register_forward_pre_hook(stop) for one in others]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _call(model: Callable[..., Any], batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple):
        model(*batch)
    else:
        model(batch)


def _moments(rows: Sequence[tuple[Tensor, list[int]]], expert: int) -> Tensor:
    seen = torch.cat([x_NI[o[expert] : o[expert + 1]] for x_NI, o in rows])
    return seen.t() @ seen
