"""Exact match with the normalisation of SQuAD.

Source: Rajpurkar et al., SQuAD, arXiv 1606.05250, section 6.1, and its evaluation script.
"""

import re
import string
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_text(text: str) -> str:
    """Lower-cases a text and removes ASCII punctuation, articles and extra white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, answers: Sequence[str]) -> float:
    """1 if the output equals one of the reference answers after `normalize_text`, else 0."""
    return float(normalize_text(answer) in {normalize_text(right) for right in answers})
