"""Multiple choice: maps a free-form output to the option that it names.

The rules are strict. The first one that matches decides; an output that matches none, or names two
options, selects no option and is wrong:

1. The output is a single letter, upper or lower case: `B`, `(b)`, `B.`
2. It begins with a capital letter set apart by brackets, `.`, `)`, `:` or the end of the line:
   `B. two dogs`, `(B) two dogs`. No other letter in it is set apart, as in an echo of all options.
3. It states the option: `answer is B`, `answer: (B)`, `option B`, `choice B`. An A or I before a
   lower-case letter is a word: `the answer is A cat`.
4. It equals the text of an option, ignoring case, articles and punctuation.
5. The text of exactly one option occurs in it, as whole words. A text within a longer one that
   occurs (`dog` in `hot dog`) does not count.

Letters beyond the last option are ignored. Options with equal texts can only be named by letter.
"""

import re
from collections.abc import Sequence
from string import ascii_uppercase

from unimoe_model.evaluation.metrics.exact import normalize_text

LETTER_REQUEST = "Answer with the option's letter from the given choices directly."
"""The request that LLaVA-v1.5 (arXiv 2310.03744) appends to the options."""

_ALONE = re.compile(r"\W*([A-Za-z])\W*")
_APART = r"""["'*]*(?:[(\[]([A-Z])[)\]]|([A-Z])["'*]*[.):](?=\s|$))"""
_LINE = r"""^["'*]*([A-Z])["'*]*$"""
_FIRST = re.compile(f"{_APART}|{_LINE}", re.MULTILINE)
# What ends a line is the end of its sentence: "C. vitamin A."
_LATER = re.compile(rf"(?:^|(?<=\s)){_APART}(?=[ \t]+\S)|{_LINE}", re.MULTILINE)
_SAID = re.compile(
    r"""\b(?:(?:[Oo]ption|[Cc]hoice)(?:\s+is)?:?\s*["'*(\[]*([A-Z])"""
    r"""|[Aa]nswer(?:\s+is)?:?\s*["'*(\[]*(?![AI]\s+[a-z])([A-Z]))(?![\w'’])"""
    r"""(?:["'*)\]]*\s*(?:,|/|\bor\b|\band\b)\s*["'*(\[]*([A-Z])(?![\w'’]))?"""
)


def with_options(question: str, options: Sequence[str]) -> str:
    """The question, its options as lines `A. text`, and the request for a letter."""
    lines = [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, options, strict=False)]
    return "\n".join([*([question] if question else []), *lines, LETTER_REQUEST])


def check_options(options: Sequence[str]) -> None:
    """Checks the number of options.

    Raises:
        ValueError: Unless there are 2 to 26 options.
    """
    if not 2 <= len(options) <= len(ascii_uppercase):
        raise ValueError(
            f"options ({len(options)}) must be 2 to {len(ascii_uppercase)}, one a letter"
        )


def right_option(answer: str, options: Sequence[str]) -> int:
    """Index of the correct option, which the data name by letter or text.

    Raises:
        ValueError: If the answer names no option, or one by its letter and another by its text.
    """
    answer = answer.strip()
    letters = ascii_uppercase[: len(options)]
    meant = {letters.index(answer)} if len(answer) == 1 and answer in letters else set()
    meant |= {i for i, option in enumerate(options) if option.strip() == answer}
    if len(meant) != 1:
        several = "only one of these" if meant else "one of these"
        raise ValueError(
            f"answer ({answer!r}) must be the letter ({letters[0]} to {letters[-1]}) or the text"
            f" of {several} options: {list(options)}"
        )
    return meant.pop()


def chosen_option(answer: str, options: Sequence[str]) -> int | None:
    """Index of the option that an output names by the rules of this module, or None."""
    answer = answer.strip()
    letters = ascii_uppercase[: len(options)]
    alone = _ALONE.fullmatch(answer)
    if alone and alone[1].upper() in letters:
        return letters.index(alone[1].upper())
    first = _FIRST.match(answer)
    if first:
        return _only(letters, [first.groups(), *_LATER.findall(answer)])
    said = _SAID.findall(answer)
    if said:
        return _only(letters, said)
    return _by_text(_comparable(answer), [_comparable(option) for option in options])


def _only(letters: str, found: Sequence[tuple[str, ...]]) -> int | None:
    named = {letter for groups in found for letter in groups if letter and letter in letters}
    return letters.index(named.pop()) if len(named) == 1 else None


def _comparable(text: str) -> str:
    # Normalisation would leave nothing of options such as "A" or "+".
    return normalize_text(text) or text.strip().lower()


def _by_text(answer: str, options: list[str]) -> int | None:
    rest, found = f" {answer} ", set()
    for text in sorted(set(options), key=len, reverse=True):
        if f" {text} " in rest:
            found.add(text)
            rest = rest.replace(f" {text} ", " | ")
    if answer in options:
        found = {answer}
    text = found.pop() if len(found) == 1 else None
    return options.index(text) if options.count(text) == 1 else None
