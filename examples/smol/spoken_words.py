"""Spoken words: synthesised by eSpeak NG for training; for some, recordings of people for tests."""

from examples.demo.spoken import WORDS

_BY_KIND = {
    "numbers": (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen twenty"
    ),
    "days": "sunday monday tuesday wednesday thursday friday saturday",
    "months": (
        "january february march april may june july august september october november december"
    ),
    "spelling": (
        "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november "
        "oscar papa quebec romeo sierra tango uniform victor whiskey x-ray yankee zulu"
    ),
}

NUMBERS, DAYS, MONTHS, SPELLING = (tuple(words.split()) for words in _BY_KIND.values())
ALL_WORDS = tuple(dict.fromkeys([*WORDS, *NUMBERS, *DAYS, *MONTHS, *SPELLING]))
