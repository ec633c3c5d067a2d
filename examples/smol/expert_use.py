"""The experts that tokens of each modality are routed to, on held-out questions."""

from collections.abc import Sequence
from typing import Any

from unimoe_model.data.encoded_media import Row
from unimoe_model.evaluation.routing import RoutingCounts
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.processing import UniMoEProcessor

ASKED = 16
"""Number of held-out questions of each task."""
ROWS_AT_ONCE = 32


def expert_use(
    model: UniMoEForConditionalGeneration, processor: UniMoEProcessor, rows: Sequence[Row]
) -> dict[str, dict[str, Any]]:
    """Counts the routed experts of prompts.

    Args:
        model: MoE model in evaluation mode.
        processor: processor of the model.
        rows: prompts with their media.

    Returns:
        For each modality that occurs: `"per_token"`, the mean number of routed experts of a token
        and layer, without null and shared ones, and `"shares"`, the share of each expert in them.

    Raises:
        ValueError: If the model has no MoE layers.
    """
    counts = RoutingCounts(model)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        counts.add(dict(processor.collate(rows[start : start + ROWS_AT_ONCE])))
    found = {}
    for modality, taken in counts.taken().items():
        total = taken.sum(0)
        found[modality] = {
            "per_token": total.sum().item() / (counts.tokens[modality] * len(counts.layers)),
            "shares": (total / total.sum().clamp(min=1)).tolist(),
        }
    return found


def use_lines(use: dict[str, dict[str, Any]], experts: Sequence[str]) -> str:
    """Formats the use of experts as lines."""
    heads = "".join(f"{name:>10}" for name in experts)
    lines = [f"{'tokens of':<12}{'experts':>8}{heads}"]
    for modality, own in use.items():
        shares = "".join(f"{100 * share:>8.1f} %" for share in own["shares"])
        lines.append(f"{modality:<12}{own['per_token']:>8.2f}{shares}")
    return "\n".join(lines)
