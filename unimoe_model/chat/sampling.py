"""Selection of the next token: greedy, or sampled with a seed."""

from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True)
class Sampling:
    """How the next token is selected; greedy without a temperature.

    Args:
        temperature: divides the logits; None selects the most probable token.
        top_p: samples from the smallest set of most probable tokens whose probabilities add up to
            at least this.
        seed: makes sampling reproducible; None draws a new seed for each reply.

    Raises:
        ValueError: If `temperature` is not from 1e-6 to 1e6, `top_p` is not in (0, 1] or is given
            without a temperature, or `seed` does not fit in 64 bits.
    """

    temperature: float | None = None
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        # float32 logits divided by much less or much more are not numbers any more.
        if self.temperature is not None and not 1e-6 <= self.temperature <= 1e6:
            raise ValueError(
                f"temperature ({self.temperature}) must be from 1e-6 to 1e6; without one replies"
                " are greedy"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be in (0, 1]")
        if self.top_p < 1 and self.temperature is None:
            raise ValueError(f"top_p ({self.top_p}) requires a temperature; there is none")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed ({self.seed}) must be from -2**63 to 2**63 - 1")

    def processors(self, device: torch.device, offset: int = 0) -> LogitsProcessorList:
        """The logits processors to pass to `generate(do_sample=False, logits_processor=...)`.

        Args:
            device: device of the logits.
            offset: added to the seed, so that replies of a conversation use different draws.
        """
        if self.temperature is None:
            return LogitsProcessorList()
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed + offset)
        warpers = [TemperatureLogitsWarper(float(self.temperature))]
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList([*warpers, _Draw(generator)])


class _Draw(LogitsProcessor):
    """Masks all tokens of each row but one, which is drawn from the softmax of its scores.

    The sampling of transformers uses torch's global generator, which conversations in one process
    would share.
    """

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Returns scores `[B, V]`: 0 for the token that was drawn, minus infinity elsewhere."""
        drawn = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)
