"""Maps activation modules of torch and transformers to activations of `swiglu`."""

import functools

import torch.nn.functional as F
from torch import nn


@functools.cache
def _classes_of_transformers() -> tuple[type, ...]:
    """The classes of `"silu"`, `"gelu"` and `"gelu_pytorch_tanh"`; none without transformers."""
    try:
        from transformers.activations import ACT2FN
    except ImportError:
        return ()
    return tuple(type(ACT2FN[name]) for name in ("silu", "gelu", "gelu_pytorch_tanh"))


def activation_name(act_fn: nn.Module) -> str | None:
    """Returns the activation of `swiglu` that equals `act_fn`, or None if there is none.

    Types are compared exactly, because a subclass may compute something else.
    """
    kind = type(act_fn)
    if kind is nn.SiLU:
        return "silu"
    if kind is nn.ReLU:
        return "relu"
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}[act_fn.approximate]
    if kind not in (known := _classes_of_transformers()):
        return None
    silu, gelu, _ = known
    if kind is silu:
        return "silu"
    inner = getattr(act_fn, "act", None)
    if kind is gelu:
        return "gelu" if inner is F.gelu else None
    return "gelu_tanh" if getattr(inner, "func", None) is F.gelu else None
