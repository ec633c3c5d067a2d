"""Input checks and conversions shared by the layers."""

from typing import Any, TypeVar

import torch

_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default


def check_positive(**sizes: int) -> None:
    """Raises ValueError for the first size below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")


def check_at_least_zero(**values: float) -> None:
    """Raises ValueError for the first value below 0."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} ({value}) must be at least 0")


def check_top_k(top_k: int, num_experts: int) -> None:
    """Raises ValueError unless 1 <= top_k <= num_experts."""
    check_positive(num_experts=num_experts, top_k=top_k)
    if top_k > num_experts:
        raise ValueError(f"top_k ({top_k}) must be at most num_experts ({num_experts})")


def check_hidden(x: torch.Tensor, weight: torch.Tensor, hidden_size: int) -> None:
    """Raises unless x is [..., hidden_size] on the device and in the dtype of weight."""
    check_width(x, weight.device, hidden_size)
    if x.dtype != weight.dtype and not autocasts(x, weight):
        raise TypeError(f"x ({x.dtype}) must have the dtype of the weights ({weight.dtype})")


def check_width(x: torch.Tensor, device: torch.device, hidden_size: int) -> None:
    """Raises ValueError unless x is [..., hidden_size] on a device."""
    if x.dim() < 1 or x.shape[-1] != hidden_size:
        raise ValueError(
            f"x (shape {tuple(x.shape)}) must have hidden_size ({hidden_size}) as last dimension"
        )
    if x.device != device:
        raise ValueError(f"x (on {x.device}) must be on the device of the weights ({device})")


def flatten_mask(token_mask: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """Checks that token_mask is bool with the leading shape of x and flattens it to [T]."""
    if token_mask is None:
        return None
    if token_mask.shape != x.shape[:-1]:
        raise ValueError(
            f"token_mask (shape {tuple(token_mask.shape)}) must have the shape of x without its "
            f"last dimension {tuple(x.shape[:-1])}"
        )
    if token_mask.dtype != torch.bool:
        raise TypeError(f"token_mask ({token_mask.dtype}) must have dtype torch.bool")
    return token_mask.reshape(-1)


def unflatten(y_TD: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Returns y in another shape, as a tensor that, unlike `y.view(shape)`, is not a view.

    FSDP loses its hooks on an output that is a view if the model changes the output in place. Use
    it only for tensors that have no other reference.
    """
    return y_TD if y_TD.shape == shape else _UNSAFE_VIEW(y_TD, shape)


def autocasts(*tensors: torch.Tensor) -> bool:
    """Returns whether torch.autocast is enabled and casts all of these (not float64, integers)."""
    device_type = tensors[0].device.type
    return (
        torch.amp.is_autocast_available(device_type)
        and torch.is_autocast_enabled(device_type)
        and all(t.dtype in (torch.float32, torch.bfloat16, torch.float16) for t in tensors)
    )


def weight_of(module: torch.nn.Module, name: str) -> Any:
    """Returns a parameter of a module by name, ten times faster than attribute access.

    An attribute that replaces the parameter, such as a parametrisation, takes precedence.
    """
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


_Held = TypeVar("_Held", torch.Tensor, torch.Tensor | None)


def local_part(weight: _Held) -> _Held:
    """Returns the local part of a DTensor; any other tensor, or None, is returned as it is."""
    # Importing the DTensor class takes half a second, which plain tensors avoid.
    if weight is None or type(weight) in (torch.Tensor, torch.nn.Parameter):
        return weight
    return weight.to_local() if hasattr(weight, "to_local") else weight
