"""Word error rate (jiwer) with Whisper's normalisation of English.

Source of the normalisation: Radford et al., arXiv 2212.04356, appendix C: lower case, without
punctuation, fillers and text in brackets; contractions expanded, numbers as digits. Its table of
British spellings is not applied, because transformers stores it with Whisper's tokenizer.
"""

from collections.abc import Sequence
from functools import cache

from unimoe_model.evaluation.metrics.score import Score
from unimoe_model.extras import needed_by


def normalize_speech(text: str) -> str:
    """Whisper's normalisation of English, without its table of spellings."""
    return " ".join(_normalizer()(text).split())


def require_jiwer():
    """Imports and returns jiwer.

    Raises:
        ModuleNotFoundError: If it is not installed; the message names the extra to install.
    """
    with needed_by("metric wer", "eval"):
        import jiwer
    return jiwer


def word_error_rate(answers: Sequence[str], references: Sequence[str]) -> Score:
    """Substituted, deleted and inserted words, divided by the words of all references.

    Args:
        answers: the model's transcripts.
        references: reference transcripts, one per output.

    Returns:
        The rate over all items (0 is best; it may exceed 1), the rate of each item, and counts.

    Raises:
        ModuleNotFoundError: If jiwer is not installed.
        ValueError: If a reference has no word after normalisation.
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
