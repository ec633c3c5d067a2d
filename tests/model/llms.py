"""Tiny LLMs of every family that a Uni-MoE is built on, with random weights."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Qwen3's: only the last answer has a thinking block, which may be empty.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
# Like Mistral's: no system message, and only the end token after an answer.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('there is no system') }}{% elif m.role == 'user' %}"
    "[INST] {{ m.content }} [/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def llm_fields(family, vocab_size=300, **fields):
    """Fields of a tiny configuration of a family, among those that it has."""
    known = CONFIG_MAPPING[family]().to_dict()
    sizes = {name: value for name, value in _SIZES.items() if name in known or "token" in name}
    return {"model_type": family, "vocab_size": vocab_size, **sizes, **fields}


def llm(family, **fields):
    """A causal LM of transformers, in float32 and eval mode."""
    fields = llm_fields(family, **fields)
    torch.manual_seed(3)
    config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    # The default, torch's grouped matmul, does not support float64.
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()


def chat_tokenizer(template, bos_token=None):
    """A byte-level tokenizer of a chat LLM."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["what color is it? red green blue", "how high? low"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        bos_token=bos_token,
        chat_template=template,
    )
