"""Small models with experts, for the tests of LoRA on them."""

import torch
import transformers

from unimoe_kernels import quantize_experts, upcycle

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# gpt-oss stores weights transposed, has biases and interleaves gate and up. Of mixtral here D = F.
CONFIGS = {
    "mixtral": ("MixtralConfig", {"intermediate_size": 32, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8, "num_experts_per_tok": 2},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "intermediate_size": 48,
            "num_local_experts": 4,
            "head_dim": 8,
            "num_experts_per_tok": 2,
            "layer_types": ["full_attention"] * 2,
        },
    ),
    "upcycled": ("LlamaConfig", {"intermediate_size": 48}),
}
TARGETS = ("gate_up_proj", "down_proj")
IDS = torch.randint(3, 40, (2, 11), generator=torch.Generator().manual_seed(1))


def build(name):
    """Returns a model by its name in `CONFIGS`; `"<name> int4"` has quantised experts."""
    name, _, format = name.partition(" ")
    config_class, options = CONFIGS[name]
    config = getattr(transformers, config_class)(**SIZES, **options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if name == "upcycled":
        upcycle(model, num_experts=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return (quantize_experts(model, format, 32) if format else model).eval()


def fill(model):
    """Makes every B of order one."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits
