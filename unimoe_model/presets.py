"""Configurations of the published sizes, by name."""

import torch

from unimoe_kernels import MoE
from unimoe_model.configuration import UniMoEConfig

_VICUNA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EIGHT = {
    "num_experts": 8,
    "moe_options": {"balance": "first"},
    "load_balancing_coef": 0.01,
    "modality_experts": {"image": [2, 3, 4, 6], "video": [2, 3, 4, 6], "speech": [0, 4, 5, 7]},
}
PRESETS = {
    "uni-moe-7b-4e": {"num_experts": 4, "moe_layers": "even"},
    "uni-moe-7b-4e-all": {"num_experts": 4, "moe_layers": "all"},
    "uni-moe-7b-8e": {**_EIGHT, "moe_layers": "even"},
    "uni-moe-7b-8e-all": {**_EIGHT, "moe_layers": "all"},
}
"""Table 1 of the paper: four or eight experts, in every second layer or in all."""


def preset(name: str, **fields) -> UniMoEConfig:
    """The configuration of a published size; the LLM is that of Vicuna-7B v1.5.

    Args:
        name: one of `PRESETS`.
        **fields: fields of `UniMoEConfig` that differ.

    Raises:
        ValueError: If there is no preset of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset ({name!r}) must be one of {tuple(PRESETS)}")
    return UniMoEConfig(**({"text_config": dict(_VICUNA_7B)} | PRESETS[name] | fields))


def llm_parameters(config: UniMoEConfig) -> tuple[int, int]:
    """Parameters of the LLM and its head, routers left out: those a token uses, and all.

    Nothing is allocated: the model is built on the meta device.
    """
    from unimoe_model.modeling import UniMoEForConditionalGeneration

    with torch.device("meta"):
        model = UniMoEForConditionalGeneration(config)
    parts = (model.model.language_model, model.lm_head)
    total = sum(p.numel() for part in parts for p in part.parameters())
    unused = 0
    for module in model.model.language_model.modules():
        if isinstance(module, MoE):
            total -= sum(p.numel() for p in module.router.parameters())
            experts = sum(p.numel() for p in module.experts.parameters())
            idle = module.experts.num_experts - module.router.top_k
            unused += experts // module.experts.num_experts * idle
    return total - unused, total
