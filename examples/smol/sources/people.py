"""Speech of people, all held out: prompts of Asterisk, and test recordings of PocketSphinx."""

from functools import partial
from pathlib import Path

from examples.smol.item import Item
from examples.smol.recordings import read_mono
from examples.smol.spoken_words import DAYS, MONTHS, NUMBERS, SPELLING

PACKAGES = {"asterisk": "asterisk-core-sounds-en-wav", "pocketsphinx": "pocketsphinx-testdata"}
SPEAKER = "Allison Smith"


def words(package: Path) -> list[Item]:
    """Returns numbers, days, months and the spelling alphabet, spoken by Allison Smith at 8 kHz.

    Args:
        package: folder of the unpacked package with Asterisk's prompts.
    """
    (folder,) = package.glob("usr/share/asterisk/sounds/en_US_f_*")
    files = {
        **{f"digits/{number}": word for number, word in enumerate(NUMBERS)},
        **{f"digits/day-{number}": word for number, word in enumerate(DAYS)},
        **{f"digits/mon-{number}": word for number, word in enumerate(MONTHS)},
        **{f"phonetic/{word[0]}_p": word for word in SPELLING},
    }
    paths = {folder / f"{name}.wav": (name, word) for name, word in files.items()}
    return [
        Item("asterisk", "speech", name.replace("/", "-"), word, SPEAKER, partial(read_mono, path))
        for path, (name, word) in paths.items()
        if path.is_file()
    ]


def sentences(package: Path) -> list[Item]:
    """Returns sentences of a LibriVox reading and names of cards, at 16 kHz, with transcripts.

    Args:
        package: folder of the unpacked package with PocketSphinx's test data.
    """
    root = package / "usr/share/pocketsphinx/test/data"
    items = []
    for folder, transcripts in (("cards", "cards.transcription"), ("librivox", "transcription")):
        for line in (root / folder / transcripts).read_text(encoding="utf-8").splitlines():
            text, _, name = line.removeprefix("<s> ").partition(" </s> (")
            path = root / folder / f"{name.rstrip(')')}.wav"
            if path.is_file():
                read = partial(read_mono, path)
                items.append(Item("pocketsphinx", "speech", path.stem, text.strip(), folder, read))
    return items
