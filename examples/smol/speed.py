"""Training speed of the language model on this machine, and the duration of the recipe."""

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from examples.smol.cached import cached
from unimoe_model.precision import resolve_precision
from unimoe_model.training.frozen_weights import frozen_weights
from unimoe_model.training.loss import autocast

ROWS, LENGTH, PASSES = 4, 256, 6
STEP_TOKENS = {
    "words": 750,
    "align": 1070,
    "pictures": 940,
    "speech": 1160,
    "sounds": 800,
    "text": 1680,
    "experts": 1390,
    "tune": 1150,
}
"""Approximate number of tokens per step by stage; for `words`, which runs only connectors, the
number that takes as long on two cores of an AMD EPYC with AVX-512 and bfloat16."""
WORK = {"words": 1.0, "align": 2.3, "text": 2.5, "tune": 2.3}
OTHER_WORK = 1.1
"""Time per token relative to the language model alone, measured on two cores of an Intel Xeon with
AVX-512 and bfloat16: LoRA on attention and the model to distill from in `align`, that model in
`text`, experts with LoRA in `tune`. Of `tune`, which took 1.5 to 3.2 with the state of the machine,
it is the middle."""
MOST_SECONDS = {"bf16": 55 * 60, "fp32": 100 * 60}
"""Limit of the training time by precision. With data, features and evaluation, a run takes about 75
minutes on two cores that have bfloat16 instructions, and under two hours on others."""


@dataclass(frozen=True)
class Forecast:
    """The estimated duration of training.

    Attributes:
        tokens_per_second: speed of the language model, forward and backward.
        seconds: seconds by stage, for the steps that are run.
        share: fraction of the recipe's steps that are run.
    """

    tokens_per_second: float
    seconds: dict[str, float]
    share: float

    def __str__(self) -> str:
        minutes = ", ".join(f"{name} {value / 60:.1f}" for name, value in self.seconds.items())
        text = (
            f"Training from the start takes about {sum(self.seconds.values()) / 60:.0f} minutes at"
            f" {self.tokens_per_second:.0f} tokens/s: {minutes}"
        )
        if self.share < 1:
            text += (
                f"\nThis machine is too slow for the whole recipe: {100 * self.share:.0f} % of its"
                " steps are taken, and the model will be worse for it; --all-steps takes all"
            )
        return text


def forecast(
    recipe: Mapping[str, Any], tokens_per_second: float, precision: str, all_steps: bool = False
) -> Forecast:
    """Estimates the duration of a recipe's stages, and the fraction of steps within the limit.

    Args:
        recipe: `arm_recipe` of an arm.
        tokens_per_second: see `Forecast`.
        precision: that of training, `"bf16"` or `"fp32"`.
        all_steps: whether there is no limit.
    """
    seconds = {}
    for stage in recipe["stages"]:
        name = stage["name"]
        tokens = STEP_TOKENS[name] * WORK.get(name, OTHER_WORK)
        seconds[name] = stage["steps"] * tokens / tokens_per_second
    most = math.inf if all_steps else MOST_SECONDS[precision]
    share = min(1.0, most / sum(seconds.values()))
    return Forecast(
        tokens_per_second, {name: share * value for name, value in seconds.items()}, share
    )


def training_speed(language_model: Path, file: Path) -> float:
    """Returns tokens per second of forward and backward.

    The value is stored in a file, so that a resumed run uses the same one.

    Args:
        language_model: folder in the layout of transformers; only the sizes of the model matter.
        file: JSON file, which is read if it exists.
    """
    return cached(file, lambda: {"tokens_per_second": _measured(language_model)})[
        "tokens_per_second"
    ]


def _measured(language_model: Path) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention = "eager" if device.type == "cpu" else "sdpa"
    config = AutoConfig.from_pretrained(language_model, attn_implementation=attention)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).model.to(device)
    model.requires_grad_(False)
    precision = resolve_precision("auto", device)
    embeddings = torch.randn(ROWS, LENGTH, config.hidden_size, device=device, requires_grad=True)
    times = []
    # As in training, frozen weights are converted once.
    frozen = frozen_weights(model, torch.bfloat16) if precision == "bf16" else nullcontext()
    with frozen:
        for _ in range(PASSES):
            started = time.perf_counter()
            with autocast(device, precision):
                hidden = model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
            # Reading a value synchronises with the device.
            hidden.float().square().mean().backward()
            embeddings.grad.sum().item()
            times.append(time.perf_counter() - started)
    return ROWS * LENGTH / min(times)
