"""Texts that SmolLM2 writes about the names of drawings, sampled at temperature 1.

Greedy replies have less entropy than text; samples lead to more of what the model can predict.
"""

from collections.abc import Iterable

REQUESTS = (
    "Write a few sentences about this: {name}",
    "Tell a short story with this in it: {name}",
    "Explain this to a child: {name}",
    "Write a paragraph of a newspaper about this: {name}",
    "Write instructions for something to do with this: {name}",
)
MAX_NEW_TOKENS = 48
SEED = 0


def requests(names: Iterable[str]) -> list[str]:
    """Returns a request about each name, in alphabetical order, of all kinds in turn."""
    ordered = sorted(set(names))
    return [REQUESTS[i % len(REQUESTS)].format(name=name) for i, name in enumerate(ordered)]
