"""Everything in float64, also what asks for float32 by name."""

import torch
from torch.overrides import TorchFunctionMode


class Wide(TorchFunctionMode):
    """Takes float64 where this package and transformers ask torch for float32."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        options = {key: _wide(value) for key, value in (options or {}).items()}
        return function(*map(_wide, arguments), **options)


def _wide(value):
    return torch.float64 if value is torch.float32 else value
