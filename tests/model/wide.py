"""Runs everything in float64, including code that requests float32 by name."""

import torch
from torch.overrides import TorchFunctionMode


class Wide(TorchFunctionMode):
    """Replaces float32 by float64 in this package and transformers."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        options = {key: _wide(value) for key, value in (options or {}).items()}
        return function(*map(_wide, arguments), **options)


def _wide(value):
    return torch.float64 if value is torch.float32 else value
