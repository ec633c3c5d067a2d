"""VQA accuracy: an output is correct if at least three other annotators gave it.

Source: Antol et al., VQA, arXiv 1505.00468, section 4, and the processing of answers described at
visualqa.org/evaluation.html. The official script agrees, except that it compares unprocessed texts
if all annotators gave the same answer ("Yes" is then wrong for "yes"); here all texts are
processed, as described.
"""

import re
from collections.abc import Sequence

FEWEST_ANSWERS = 4
"""With fewer, not even a unanimous answer could score 1."""

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
# The official script does not treat colon and apostrophe as punctuation.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# Lower-case contractions of the official script, which omits those that are another word without
# their apostrophe, such as she'll and we're.
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't"
    " haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't"
    " mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've"
    " should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd"
    " someone'd've someone'll someone's something'd something'd've something'll that's there'd"
    " there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've"
    " we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've"
    " who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll"
    " y'all'd've you'd you'd've you'll you're you've"
)


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


_COMPLETED = {
    incomplete: word
    for word in _CONTRACTIONS.split()
    for incomplete in _without_one_apostrophe(word)
}


def normalize_answer(answer: str) -> str:
    """Normalises an answer for comparison, as the official script does.

    Lower-cases the text, converts number words up to ten to digits, removes articles and periods
    (except for decimal points), and restores missing apostrophes of contractions. Punctuation
    becomes a space, or is removed if it is next to a space or the answer has a comma between
    digits.

    Example:
        `normalize_answer("The two dogs, dont know.")` returns `"2 dogs don't know"`.
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    has_number = _COMMA_IN_NUMBER.search(answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or has_number else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", text).lower().split()]
    return " ".join(_COMPLETED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """Accuracy of one output: min(matches / 3, 1), averaged over leaving out each annotator.

    Args:
        answer: the model's output.
        answers: answers of the annotators, ten in VQA v2, OK-VQA and A-OKVQA.

    Returns:
        Between 0 and 1; with ten annotators 0.3, 0.6, 0.9 and 1 for one, two, three and more
        matches.

    Raises:
        ValueError: If there are fewer than four answers.
    """
    if len(answers) < FEWEST_ANSWERS:
        raise ValueError(
            f"answers ({len(answers)}) must be those of at least {FEWEST_ANSWERS} people"
        )
    given = normalize_answer(answer)
    matches = [normalize_answer(other) == given for other in answers]
    total = sum(matches)
    return sum(min((total - match) / 3, 1.0) for match in matches) / len(answers)
