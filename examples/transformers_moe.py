"""A mixture-of-experts model of transformers, before and after `register_with_transformers`.

Run it: python examples/transformers_moe.py [--model FOLDER_OR_NAME]

Without --model it uses a small Mixtral with random weights. All implementations have the same
outputs and differ in time. They are timed in turns, so that disturbances affect all of them.
"""

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from unimoe_kernels import register_with_transformers
from unimoe_kernels.testing import relative_error

IMPLEMENTATIONS = ("eager", "grouped_mm", "unimoe")


def build(name: str | None, width: int) -> PreTrainedModel:
    """Loads a model by name, or builds a Mixtral of four layers and 8 experts."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=8000,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        max_position_embeddings=4096,
    )
    return AutoModelForCausalLM.from_config(config)


def forward(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Runs a forward pass and returns the logits of all positions."""
    with torch.no_grad():
        return model(ids).logits


def training_step(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Runs a forward and a backward pass, with gradients of all weights."""
    model.zero_grad(set_to_none=True)
    model(ids, labels=ids).loss.backward()


def seconds(function, *arguments) -> float:
    """Measures the seconds of one call."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def main(name: str | None, width: int, tokens: int, rounds: int) -> dict[str, float]:
    """Prints the table; returns the relative error of each implementation against eager."""
    register_with_transformers()
    model = build(name, width).eval()
    ids = torch.randint(3, model.config.vocab_size, (2, tokens // 2))
    times = {(i, f): [] for i in IMPLEMENTATIONS for f in (forward, training_step)}
    errors, expected = {}, None
    for turn in range(rounds + 1):
        for implementation in IMPLEMENTATIONS:
            model.set_experts_implementation(implementation)
            if turn == 0:
                logits = forward(model, ids)
                expected = logits if expected is None else expected
                errors[implementation] = relative_error(logits, expected)
            for function in (forward, training_step):
                took = seconds(function, model, ids)
                if turn > 0:
                    times[implementation, function].append(took)
    print(f"{tokens} tokens, medians of {rounds} rounds")
    print(f"{'experts':12} {'forward':>10} {'training step':>15} {'from eager':>12}")
    for implementation in IMPLEMENTATIONS:
        own = [statistics.median(times[implementation, f]) for f in (forward, training_step)]
        print(
            f"{implementation:12} {1e3 * own[0]:7.1f} ms {1e3 * own[1]:12.1f} ms "
            f"{errors[implementation]:12.1e}"
        )
    return errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or a name on the hub; default: random weights")
    parser.add_argument("--width", type=int, default=512, help="model width without --model")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    main(given.model, given.width, given.tokens, given.rounds)
