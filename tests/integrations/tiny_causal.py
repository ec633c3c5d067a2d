"""Causal models of transformers at tiny sizes, with weights that give outputs of order one."""

import torch
import transformers


def tiny_causal(kind, sizes, **options):
    """A model of `{kind}Config`, the same weights every time."""
    config = getattr(transformers, f"{kind}Config")(**sizes, **options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model
