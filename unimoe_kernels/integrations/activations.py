"""Which of our activations a module of torch or transformers computes."""

import torch.nn.functional as F
from torch import nn


def activation_name(act_fn: nn.Module) -> str | None:
    """The activation of `swiglu` that equals `act_fn`, or None if none does.

    Exact types: a subclass may compute something else.
    """
    kind, inner = type(act_fn), getattr(act_fn, "act", None)
    if kind is nn.SiLU:
        return "silu"
    if kind is nn.ReLU:
        return "relu"
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}[act_fn.approximate]
    try:
        from transformers.activations import ACT2FN
    except ImportError:
        return None
    if kind is type(ACT2FN["silu"]):
        return "silu"
    if kind is type(ACT2FN["gelu"]) and inner is F.gelu:
        return "gelu"
    if kind is type(ACT2FN["gelu_pytorch_tanh"]) and getattr(inner, "func", None) is F.gelu:
        return "gelu_tanh"
    return None
