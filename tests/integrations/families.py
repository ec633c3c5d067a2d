"""Tiny models of every family of transformers whose experts a registered function can run.

Which families there are is read from the installed transformers, so that new ones are tested too.
"""

import dataclasses
import functools
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

SIZES_ARE_FOR = "5.24."
# Where a configuration has a field of that name, it gets this value.
_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_ALL_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
# What the values above do not settle: layers of every kind, and experts in them.
_SPECIAL = {
    "bailing_hybrid": _HYBRID,
    "beam": _ALL_SPARSE,
    "deepseek_ocr2": _ALL_SPARSE,
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [24, 24],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "flint": {"mlp_only_layers": []},
    "gemma4": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
    },
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 0],
        }
    },
    "glm5_next": {
        **_ALL_SPARSE,
        "layer_types": ["linear_attention", "indexed_attention"],
        "qk_rope_head_dim": 0,
    },
    "granitemoehybrid": {**_HYBRID, "mamba_n_heads": 8},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "hy_v4_vl": {
        **_ALL_SPARSE,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 1, 1],
        },
    },
    "inkling2_loop": {
        "layer_types": ["hybrid", "hybrid_sliding"],
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "loop_num_passes": 2,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _HYBRID,
    "lara_mini": _HYBRID,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "qwen3_5_moe": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen3_omni_moe": {"shared_expert_intermediate_size": 24},
    "qwen4_exp": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}
_MODELS = ("ForCausalLM", "TextModel", "ForTokenClassification", "Model")
_DECORATED = re.compile(r"^@use_experts_implementation.*\n(?:@.*\n)*class (\w+)\(", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Family:
    """A class of experts, and where transformers defines it."""

    folder: str
    module_name: str
    experts_name: str

    def __str__(self) -> str:
        return self.folder if self is _first_of(self.folder) else self.experts_name

    @property
    def module(self):
        """The module of the model."""
        return importlib.import_module(f"transformers.models.{self.folder}.{self.module_name}")


def _find() -> list[Family]:
    found = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for name in _DECORATED.findall(path.read_text(encoding="utf-8")):
            found.append(Family(path.parent.name, path.stem, name))
    return found


FAMILIES = _find()


def _first_of(folder: str) -> Family:
    return next(family for family in FAMILIES if family.folder == folder)


@functools.cache
def model_class_of(family: Family) -> type[PreTrainedModel]:
    """The model with these experts that comes nearest to text in, logits out."""
    models = [
        kind
        for kind in vars(family.module).values()
        if inspect.isclass(kind)
        and issubclass(kind, PreTrainedModel)
        and kind.__module__ == family.module.__name__
        and kind.__name__.endswith(_MODELS)
        and not kind.__name__.endswith("PreTrainedModel")
    ]
    rank = {kind: [kind.__name__.endswith(end) for end in _MODELS].index(True) for kind in models}
    experts = getattr(family.module, family.experts_name)
    for kind in sorted(models, key=lambda kind: (rank[kind], len(kind.__name__))):
        try:
            # Without memory: of a class that these sizes do not suit, parts stay large.
            with torch.device("meta"):
                model = kind._from_config(_tiny_config(family, kind.config_class))
        except Exception:
            # Not every class of a file is a model of text that these sizes suit.
            continue
        if any(type(module) is experts for module in model.modules()):
            return kind
    reason = f"no tiny model of {family} could be built: add its sizes to _SPECIAL"
    if not transformers.__version__.startswith(SIZES_ARE_FOR):
        pytest.skip(reason)
    raise LookupError(reason)


def _tiny_config(family: Family, kind: type[PreTrainedConfig], **sizes: int) -> PreTrainedConfig:
    fields = {field.name for field in dataclasses.fields(kind)}
    special = dict(_SPECIAL.get(family.folder, {}))
    special |= {
        name: [sizes[name]] * len(value)
        for name, value in special.items()
        if name in sizes and isinstance(value, list)
    }
    small = {name: value for name, value in (_SMALL | sizes).items() if name in fields}
    return kind(**small | special)


def tiny_model(family: Family, **sizes: int) -> PreTrainedModel:
    """A model on its eager experts, the same random weights of order one at every call."""
    kind = model_class_of(family)
    config = _tiny_config(family, kind.config_class, **sizes)
    torch.manual_seed(0)
    model = kind._from_config(
        config, experts_implementation="eager", attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
    return model


def experts_of(model: PreTrainedModel, family: Family) -> nn.Module:
    """The first module of that class of experts."""
    return next(m for m in model.modules() if type(m).__name__ == family.experts_name)
