"""Short phrases of any words, to be spoken: parts of texts that SmolLM2 wrote, and names."""

import random
import re
from collections.abc import Iterable

MOST_WORDS = 6
"""Maximum number of words of a phrase, which then takes less than three seconds."""
_SENTENCE_ENDS = re.compile(r"[.!?:;\n]+")
_WORDS = re.compile(r"[a-z]+(?:'[a-z]+)?")


def phrases(texts: Iterable[str]) -> list[str]:
    """Returns the distinct phrases that sentences are cut into, in lower case, in their order.

    Each phrase has one to `MOST_WORDS` words; the same texts give the same phrases.

    Args:
        texts: English.
    """
    rng = random.Random("phrases")
    found = {}
    for text in texts:
        for sentence in _SENTENCE_ENDS.split(text.lower()):
            words = _WORDS.findall(sentence)
            while words:
                length = rng.randint(1, MOST_WORDS)
                found[" ".join(words[:length])] = None
                del words[:length]
    return list(found)
