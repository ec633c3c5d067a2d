"""CIDEr-D, the metric that captioning papers report as CIDEr.

Source: Vedantam et al., CIDEr, arXiv 1411.5726, section 3 and its supplement (CIDEr-D): tf-idf
vectors of the n-grams of 1 to 4 words, clipped cosine similarity to each reference, a Gaussian
penalty (sigma 6) on the difference in length, ten times the mean. As in the COCO caption tools,
document frequencies are those of the references that are scored.

Those tools use a Java implementation of the Penn Treebank tokenizer; `caption_words` splits
ordinary captions in the same way.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from unimoe_model.evaluation.metrics.score import Score

NGRAMS = 4
SIGMA = 6.0
FEWEST_ITEMS = 2
"""With a single item the idf of every n-gram is log(1), so any caption would score 0."""

_PART = r"(?:(?!n't(?!\w))\w)+"
_SUFFIX = r"'(?:s|m|d|re|ve|ll)(?!\w)"
# Brackets stay, as in the published tools, whose list of punctuation misses their lower-case names.
_WORD = re.compile(
    rf"""
    \d+(?:[.,:/]\d+)*(?:st|nd|rd|th|s)?(?!\w|-\w)        # 3.5  1,000  10:30  1/2  2nd
    | (?:[a-z]\.){{2,}}                                   # u.s.  p.m.
    | \b(?:mr|mrs|ms|dr|st|vs|lt|jr|sr|etc)\.(?=[\s,;]|$)
    | n't(?!\w) | {_SUFFIX} | 'n'
    | can(?=not\b) | gon(?=na\b) | wan(?=na\b) | got(?=ta\b)
    | {_PART}(?:(?!{_SUFFIX})[-/.']{_PART})*             # t-shirt  o'clock
    | [!?]{{2,}} | [$£€%&@#*+=()\[\]{{}}<>]
    """,
    re.VERBOSE,
)
_CURLY = str.maketrans("‘’", "''")


def caption_words(caption: str) -> list[str]:
    """Lower-case words of a caption, without punctuation; contractions are split ("do", "n't")."""
    return _WORD.findall(caption.lower().translate(_CURLY))


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """CIDEr-D of captions.

    Args:
        answers: the model's captions, one per item.
        references: reference captions, one or more per item.

    Returns:
        The score of each item, 0 to 10, and their mean; papers report a hundred times the mean.

    Raises:
        ValueError: If there are fewer than two items.
    """
    if len(answers) < FEWEST_ITEMS:
        raise ValueError(
            f"items ({len(answers)}) must be at least {FEWEST_ITEMS}: CIDEr weighs words by how"
            " few of the items they occur in"
        )
    given = [_ngrams(caption_words(answer)) for answer in answers]
    right = [[_ngrams(caption_words(text)) for text in texts] for texts in references]
    frequency = Counter(ngram for texts in right for ngram in set().union(*texts))
    idf = _Idf(frequency, len(answers))
    per_item = [
        10 * sum(_similarity(idf, counts, other) for other in texts) / len(texts)
        for counts, texts in zip(given, right, strict=True)
    ]
    return Score.mean(per_item)


class _Idf:
    """Inverse document frequency: log of all items over items whose references have the n-gram."""

    def __init__(self, frequency: Counter, items: int):
        self._frequency = frequency
        self._log_items = math.log(items)

    def vector(self, counts: Counter, length: int) -> dict[tuple[str, ...], float]:
        """Tf-idf of the n-grams of `length` words."""
        return {
            ngram: count * (self._log_items - math.log(max(1, self._frequency[ngram])))
            for ngram, count in counts.items()
            if len(ngram) == length
        }


def _ngrams(words: list[str]) -> Counter:
    return Counter(
        tuple(words[i : i + n]) for n in range(1, NGRAMS + 1) for i in range(len(words) - n + 1)
    )


def _similarity(idf: _Idf, answer: Counter, reference: Counter) -> float:
    # The published code measures the length of a caption in bigrams.
    difference = _bigrams(answer) - _bigrams(reference)
    penalty = math.exp(-(difference**2) / (2 * SIGMA**2))
    total = 0.0
    for n in range(1, NGRAMS + 1):
        a, r = idf.vector(answer, n), idf.vector(reference, n)
        norms = math.hypot(*a.values()) * math.hypot(*r.values())
        if norms:
            shared = a.keys() & r.keys()
            total += sum(min(a[ngram], r[ngram]) * r[ngram] for ngram in shared) / norms
    return penalty * total / NGRAMS


def _bigrams(counts: Counter) -> int:
    return sum(count for ngram, count in counts.items() if len(ngram) == 2)
