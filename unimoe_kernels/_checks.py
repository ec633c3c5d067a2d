"""Argument checks shared by the operators: name, value and expectation in one line.

They read only shapes, dtypes and devices, so they do not synchronise with the device and trace
under `torch.compile`. `VALUE_CHECKS` enables those that read values.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

VALUE_CHECKS = os.environ.get("UNIMOE_CHECKS", "0") not in ("", "0")

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)

MOST_SIGNATURES = 4096


def signature_of(*arguments: object) -> tuple:
    """Returns the shape, dtype and device of each tensor, and other arguments as they are."""
    return tuple(
        [
            (one.shape, one.dtype, one.device) if isinstance(one, Tensor) else one
            for one in arguments
        ]
    )


def once_per_signature(
    check: Callable[..., None], signature_of: Callable[..., tuple] = signature_of
) -> Callable[..., None]:
    """Decorates a check of shapes, dtypes and devices to run once per signature that passes it.

    Under `torch.compile` and for unhashable signatures, such as symbolic sizes, every call is
    checked.

    Args:
        check: Function of tensors and other hashable arguments.
        signature_of: Returns everything that `check` depends on: shape, dtype and device of
            tensors, and all other arguments.
    """
    passed: set[tuple] = set()

    @functools.wraps(check)
    def checked(*arguments: object) -> None:
        if torch.compiler.is_compiling():
            return check(*arguments)
        try:
            signature = signature_of(*arguments)
            if signature in passed:
                return None
        except (AttributeError, TypeError):  # not a tensor, or not hashable
            return check(*arguments)
        check(*arguments)
        if len(passed) >= MOST_SIGNATURES:
            passed.clear()
        passed.add(signature)
        return None

    return checked


def check_tensor(
    name: str, tensor: Tensor, shape: str, dtypes: tuple[torch.dtype, ...] = FLOATS
) -> None:
    """Checks the dtype and number of dimensions of a tensor; `shape` is for example `"[T, D]"`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} ({type(tensor).__name__}) must be a tensor of shape {shape}")
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} ({tensor.dtype}) must have dtype {expected}")
    if tensor.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} (shape {tuple(tensor.shape)}) must have shape {shape}")


def check_size(name: str, tensor: Tensor, dim: int, expected: int, what: str) -> None:
    """Checks one size of a tensor; `what` names the source of the expected size."""
    if tensor.shape[dim] != expected:
        raise ValueError(
            f"{name} (shape {tuple(tensor.shape)}) must have size {expected} in dimension {dim}: "
            f"{what}"
        )


def check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Checks that two tensors have the same dtype and device."""
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{name} ({tensor.dtype}) must have the dtype of {other_name} ({other.dtype})"
        )
    check_device(name, tensor, other_name, other)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Checks that two tensors are on the same device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} (on {tensor.device}) must be on the device of {other_name} ({other.device})"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Checks that a value is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} ({value!r}) must be one of {', '.join(choices)}")


def check_positive(name: str, value: int) -> None:
    """Checks that an integer is at least 1."""
    if value < 1:
        raise ValueError(f"{name} ({value}) must be at least 1")


def reads_values(tensor: Tensor) -> bool:
    """Returns whether value checks are enabled and the values of this tensor can be read."""
    if not VALUE_CHECKS or tensor.is_meta or torch.compiler.is_compiling():
        return False
    return not transformed()


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Casts operands of a matmul to the dtype that `torch.autocast` uses for torch's matmuls.

    As in torch, float64 is not cast. Arguments that are not tensors are returned as they are, so
    that the checks can report them.
    """
    device_type = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.amp.is_autocast_available(device_type):
        return tensors
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(
        tensor.to(dtype) if isinstance(tensor, Tensor) and tensor.dtype in narrow else tensor
        for tensor in tensors
    )


def check_ids(ids: Tensor) -> None:
    """Raises ValueError if value checks are enabled and an id is negative."""
    if reads_values(ids) and ids.numel() and ids.min() < 0:
        raise ValueError(f"ids (minimum {ids.min().item()}) must not be negative")


def transformed() -> bool:
    """Returns whether a `torch.func` transform or forward-mode AD is active.

    Neither supports an operator that is not composed of torch operations. The call takes 0.1 us,
    and `torch.compile` can trace it.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_sharded(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError if a tensor that must not be sharded is a DTensor."""
    if hasattr(tensor, "full_tensor"):
        raise ValueError(
            f"{name} (DTensor) must not be sharded between ranks: gather it with full_tensor()"
        )


def refuse_transforms(name: str) -> None:
    """Raises NotImplementedError under a `torch.func` transform or forward-mode AD."""
    if transformed():
        raise NotImplementedError(
            f"{name} does not support torch.func (grad, jvp, vmap, ...) and forward-mode AD: use "
            "torch.autograd"
        )


def refuse_second_derivatives(name: str) -> None:
    """Raises NotImplementedError in a backward that builds a graph.

    Call it first in the backward of a `torch.autograd.Function`, before anything is sent.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(f"{name} does not support second derivatives (create_graph=True)")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which sums are accumulated: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
