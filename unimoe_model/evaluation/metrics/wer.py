"""Word error rate, by jiwer, after Whisper's normalisation of English.

Source of the normalisation: Radford et al., arXiv 2212.04356, appendix C: lower case, without
punctuation, fillers and what is in brackets; contractions written out, numbers as digits. Its table
of British spellings is left out, as transformers keeps it with Whisper's tokenizer.
"""

from collections.abc import Sequence
from functools import cache

from unimoe_model.evaluation.metrics.score import Score
from unimoe_model.extras import needed_by


def normalize_speech(text: str) -> str:
    """Whisper's normalisation of English, without its table of spellings."""
    return " ".join(_normalizer()(text).split())


def require_jiwer():
    """The package that counts errors.

    Raises:
        ModuleNotFoundError: If it is not installed; the message says how to install it.
    """
    with needed_by("metric wer", "eval"):
        import jiwer
    return jiwer


def word_error_rate(answers: Sequence[str], references: Sequence[str]) -> Score:
    """Substituted, deleted and inserted words of all answers by the words of all references.

    Args:
        answers: what was heard.
        references: what was said, one for each.

    Returns:
        The rate (0 is best, it may exceed 1), that of each item, and the counts.

    Raises:
        ModuleNotFoundError: If jiwer is not installed.
        ValueError: If a reference holds no word after normalisation.
    """
    jiwer = require_jiwer()
    given = [normalize_speech(answer) for answer in answers]
    right = [normalize_speech(reference) for reference in references]
    for text, reference in zip(right, references, strict=True):
        if not text:
            raise ValueError(f"answer ({reference!r}) must hold a spoken word")
    measured = jiwer.process_words(right, given)
    per_item = [jiwer.wer(*pair) for pair in zip(right, given, strict=True)]
    counts = {
        "substitutions": measured.substitutions,
        "deletions": measured.deletions,
        "insertions": measured.insertions,
        "reference_words": sum(len(text.split()) for text in right),
    }
    return Score(measured.wer, per_item, counts)


@cache
def _normalizer():
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})
