"""Synthetic speech: words and questions spoken by eSpeak NG, with voices disjoint by split."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from examples.stand_ins.assets import asset_file, asset_folder
from unimoe_model.data.audio_io import resample

ESPEAK_PACKAGE = "espeakng_loader"
SAMPLE_RATE = 16_000

_WORDS_BY_KIND = {
    "digits": "zero one two three four five six seven eight nine",
    "colours": "red green blue yellow black",
    "directions": "up down left right stop",
    "answers": "yes no",
    "animals": "cat dog bird horse",
    "things": "house tree water music",
}

WORDS = tuple(word for words in _WORDS_BY_KIND.values() for word in words.split())
"""The 30 spoken words."""

_ACCENTS = (
    "en-us",
    "en-gb-x-rp",
    "en-gb-scotland",
    "en-us-nyc",
    "en-gb-x-gbclan",
    "en-029",
    "en-gb-x-gbcwmd",
)

# Numbered takes of one voice (iven, iven2, ...) stay in one split. Whispers, robots and other sound
# effects among the variants are not used; the rest was drawn at random.
_VARIANTS = {
    "train": (
        "rob Lee m5 Marco boris f5 Alicia adam ed Hugo grandma Andrea Michael Henrique m4 pedro f2 "
        "gustave shelby m7 klatt klatt2 klatt3 klatt4 klatt5 klatt6 ian f3 Andy AnxiousAndy miguel "
        "f1 aunty robert m8 kaukovalta Diogo m2 Annie Mario"
    ),
    "validation": "benjamin Storm announcer belinda Denis victor",
    "test": (
        "quincy Gene Gene2 travis zac Mr_serious m6 steph steph2 steph3 grandpa Nguyen david "
        "marcelo iven iven2 iven3 iven4 Alex m3"
    ),
}

SPLITS = tuple(_VARIANTS)

WORD_VOICES = {
    split: tuple(
        f"{_ACCENTS[index % len(_ACCENTS)]}+{variant.replace('_', ' ')}"
        for index, variant in enumerate(variants.split())
    )
    for split, variants in _VARIANTS.items()
}
"""Voices by split, `accent+variant`: 40, 6 and 20, no variant in two splits."""

QUESTION_VOICES = {
    "train": WORD_VOICES["train"][::3],
    "validation": WORD_VOICES["validation"][::3],
    "test": WORD_VOICES["test"][::4],
}
"""Voices of the questions: 14, 2 and 5 of those of the words."""


def synthesize(text: str, voice: str) -> NDArray[np.float32]:
    """Speaks one phrase; the same text and voice always give the same samples.

    Args:
        text: English.
        voice: `accent+variant` of eSpeak NG, e.g. `"en-us+f2"`.

    Returns:
        `[samples]` at 16 kHz, full scale at 1.

    Raises:
        MissingAssetError: If the package `espeakng-loader` is not installed.
        ValueError: If eSpeak NG has no such voice or finds nothing to say in the text.
    """
    return synthesize_all([(text, voice)])[0]


def synthesize_all(
    phrases: Sequence[tuple[str, str] | tuple[str, str, int]],
) -> list[NDArray[np.float32]]:
    """Speaks many phrases, on all cores; see `synthesize`.

    Args:
        phrases: text and voice of each, and words per minute where it is not that of the voice.
    """
    workers = os.cpu_count() or 1
    size = max(1, -(-len(phrases) // workers))
    parts = [phrases[start : start + size] for start in range(0, len(phrases), size)]
    with ThreadPoolExecutor(workers) as pool:
        return [wave for waves in pool.map(_speak, parts) for wave in waves]


def _speak(phrases: Sequence[tuple]) -> list[NDArray[np.float32]]:
    library = asset_file(ESPEAK_PACKAGE, "libespeak-ng.so")
    data = asset_folder(ESPEAK_PACKAGE) / "espeak-ng-data"
    program = Path(__file__).with_name("espeak.py")
    result = subprocess.run(
        [sys.executable, "-P", program, library, data],
        input=json.dumps([list(phrase) for phrase in phrases]).encode(),
        capture_output=True,
        check=False,
    )
    if result.returncode != 0:
        message = result.stderr.decode(errors="replace").strip()
        raise ValueError(f"speech synthesis failed: {message}")
    with np.load(io.BytesIO(result.stdout)) as spoken:
        wave = spoken["wave"].astype(np.float32) / 32768
        ends = np.cumsum(spoken["samples"])
        rate = int(spoken["sample_rate"])
    return [resample(clip, rate, SAMPLE_RATE) for clip in np.split(wave, ends[:-1])]


def word_phrases(split: str) -> list[tuple[str, str]]:
    """The 30 words of `WORDS`, each in every voice of the split.

    Args:
        split: `"train"` (1200 clips), `"validation"` (180) or `"test"` (600).

    Returns:
        Word and voice of every clip.

    Raises:
        ValueError: If there is no such split.
    """
    _check_split(split)
    return [(word, voice) for voice in WORD_VOICES[split] for word in WORDS]


def question_phrases(texts: Sequence[str], split: str) -> list[tuple[str, str]]:
    """Questions, each in every voice of the split.

    Args:
        texts: the questions, the same in all splits.
        split: `"train"` (14 voices), `"validation"` (2) or `"test"` (5).

    Returns:
        Text and voice of every clip.

    Raises:
        ValueError: If there is no such split, or there are no texts.
    """
    _check_split(split)
    if not texts:
        raise ValueError("texts must hold at least one question")
    return [(text, voice) for voice in QUESTION_VOICES[split] for text in texts]


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split ({split!r}) must be one of {', '.join(SPLITS)}")
