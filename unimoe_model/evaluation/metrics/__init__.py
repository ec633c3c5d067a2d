"""The paper's metrics, by the names that `unimoe eval --metric` accepts.

A metric checks the lines of a data file before the model runs, formats questions, and scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unimoe_model.evaluation.metrics.choice import (
    check_options,
    chosen_option,
    right_option,
    with_options,
)
from unimoe_model.evaluation.metrics.cider import FEWEST_ITEMS, caption_words, cider
from unimoe_model.evaluation.metrics.exact import exact_match, normalize_text
from unimoe_model.evaluation.metrics.score import Score
from unimoe_model.evaluation.metrics.vqa import FEWEST_ANSWERS, vqa_accuracy
from unimoe_model.evaluation.metrics.wer import normalize_speech, require_jiwer, word_error_rate
from unimoe_model.evaluation.samples import Sample


@dataclass(frozen=True)
class Metric:
    """How the samples of a data file are checked, formatted and scored.

    Attributes:
        title: printed name.
        unit: printed unit of a hundred times the value.
        check: raises ValueError, naming key and value, for a sample that cannot be scored.
        score: returns the score of samples and the model's outputs.
        question: returns the question to ask for a sample.
        fewest_items: minimum number of samples for a meaningful score.
        require: raises ModuleNotFoundError if a required package is not installed.
    """

    title: str
    unit: str
    check: Callable[[Sample], None]
    score: Callable[[Sequence[Sample], Sequence[str]], Score]
    question: Callable[[Sample], str] = lambda sample: sample.question
    fewest_items: int = 1
    require: Callable[[], object] = lambda: None


def _check_vqa(sample: Sample) -> None:
    if len(sample.answers) < FEWEST_ANSWERS:
        raise ValueError(
            f"answers ({len(sample.answers)}) must be those of at least {FEWEST_ANSWERS} people,"
            " usually ten"
        )


def _score_vqa(samples: Sequence[Sample], answers: Sequence[str]) -> Score:
    pairs = zip(samples, answers, strict=True)
    return Score.mean([vqa_accuracy(answer, sample.answers) for sample, answer in pairs])


def _check_exact(sample: Sample) -> None:
    _require_answers(sample)
    for answer in sample.answers:
        if not normalize_text(answer):
            raise ValueError(
                f"answer ({answer!r}) must hold more than articles and punctuation, which do not"
                " count"
            )


def _score_exact(samples: Sequence[Sample], answers: Sequence[str]) -> Score:
    pairs = zip(samples, answers, strict=True)
    return Score.mean([exact_match(answer, sample.answers) for sample, answer in pairs])


def _check_choice(sample: Sample) -> None:
    if not sample.options:
        raise ValueError("options is missing; it must be a list of at least 2 texts")
    check_options(sample.options)
    right_option(_only_answer(sample), sample.options)


def _score_choice(samples: Sequence[Sample], answers: Sequence[str]) -> Score:
    pairs = zip(samples, answers, strict=True)
    chosen = [chosen_option(answer, sample.options) for sample, answer in pairs]
    right = [right_option(sample.answers[0], sample.options) for sample in samples]
    return Score.mean(
        [float(a == b) for a, b in zip(chosen, right, strict=True)],
        without_choice=chosen.count(None),
    )


def _check_wer(sample: Sample) -> None:
    answer = _only_answer(sample)
    if not normalize_speech(answer):
        raise ValueError(f"answer ({answer!r}) must hold a spoken word")


def _score_wer(samples: Sequence[Sample], answers: Sequence[str]) -> Score:
    return word_error_rate(answers, [sample.answers[0] for sample in samples])


def _check_cider(sample: Sample) -> None:
    _require_answers(sample)
    for answer in sample.answers:
        if not caption_words(answer):
            raise ValueError(f"answer ({answer!r}) must be a caption with a word in it")


def _score_cider(samples: Sequence[Sample], answers: Sequence[str]) -> Score:
    return cider(answers, [sample.answers for sample in samples])


def _require_answers(sample: Sample) -> None:
    if not sample.answers:
        raise ValueError("answer or answers is missing; a score requires a reference answer")


def _only_answer(sample: Sample) -> str:
    _require_answers(sample)
    if len(sample.answers) > 1:
        raise ValueError(f"answers ({len(sample.answers)}) must be one for this metric")
    return sample.answers[0]


METRICS = {
    "vqa": Metric("VQA accuracy", " %", _check_vqa, _score_vqa),
    "exact": Metric("exact match", " %", _check_exact, _score_exact),
    "choice": Metric(
        "multiple choice accuracy",
        " %",
        _check_choice,
        _score_choice,
        question=lambda sample: with_options(sample.question, sample.options),
    ),
    "wer": Metric("word error rate", " %", _check_wer, _score_wer, require=require_jiwer),
    "cider": Metric("CIDEr-D x 100", "", _check_cider, _score_cider, fewest_items=FEWEST_ITEMS),
}
"""By name: VQA accuracy, exact match, multiple choice, word error rate and CIDEr."""
