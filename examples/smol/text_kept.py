"""Comparison with SmolLM2 after training: perplexity of held-out text, and chat replies."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from examples.smol.language_model import answers, perplexity
from unimoe_model.modeling import UniMoEForConditionalGeneration

BLOCK = 256
MOST_BLOCKS = 24
"""Number of blocks of each kind of text, from its beginning: 6144 tokens."""
ANSWER_TOKENS = 48
CHAT_PROMPTS = 10


def text_kept(
    language_model: Path, trained: Path, texts: Mapping[str, str], prompts: Sequence[str]
) -> dict[str, dict]:
    """Compares a trained model with the language model that it was built from.

    Args:
        language_model: folder of the language model.
        trained: folder of the trained model.
        texts: held-out text by kind; one that is shorter than a block counts as one block.
        prompts: prompts of the user.

    Returns:
        `"perplexity"`: values `"before"` and `"after"` by kind; `"chat"`: for each prompt its text
        and the replies `"before"` and `"after"`.

    Raises:
        ValueError: If a text has fewer than two tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blocks = {kind: token_blocks(tokenizer, text).to(device) for kind, text in texts.items()}
    found = {}
    # One after the other, so that only one model is in memory.
    for name, family, folder in (
        ("before", AutoModelForCausalLM, language_model),
        ("after", UniMoEForConditionalGeneration, trained),
    ):
        model = family.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        found[name] = _measured(model, tokenizer, blocks, prompts)
        del model
    before, after = found["before"], found["after"]
    return {
        "perplexity": {
            kind: {"before": before[0][kind], "after": after[0][kind]} for kind in blocks
        },
        "chat": [
            {"prompt": prompt, "before": old, "after": new}
            for prompt, old, new in zip(prompts, before[1], after[1], strict=True)
        ],
    }


def token_blocks(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Returns the first whole blocks of a text's token ids, `[blocks, BLOCK]`.

    A text that is shorter than a block is one shorter block.

    Raises:
        ValueError: If the text has fewer than two tokens.
    """
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    if len(ids) < 2:
        raise ValueError(f"text ({text!r}) must have at least two tokens, it has {len(ids)}")
    if len(ids) < BLOCK:
        return ids[None]
    count = min(len(ids) // BLOCK, MOST_BLOCKS)
    return ids[: count * BLOCK].view(count, BLOCK)


def text_lines(kept: Mapping[str, dict]) -> str:
    """Formats the comparison as lines."""
    lines = [f"{'perplexity of':<16}{'SmolLM2':>9}{'model':>9}{'change':>9}"]
    for kind, own in kept["perplexity"].items():
        change = f"{100 * (own['after'] / own['before'] - 1):+.1f} %"
        lines.append(f"{kind:<16}{own['before']:>9.2f}{own['after']:>9.2f}{change:>9}")
    for own in kept["chat"]:
        lines += ["", own["prompt"], f"  SmolLM2: {own['before']}", f"  model:   {own['after']}"]
    return "\n".join(lines)


def _measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Mapping[str, Tensor],
    prompts: Sequence[str],
) -> tuple[dict[str, float], list[str]]:
    values = {kind: perplexity(model, own) for kind, own in blocks.items()}
    said = answers(model, tokenizer, prompts, ANSWER_TOKENS) if prompts else []
    return values, [" ".join(text.split()) for text, _ in said]
