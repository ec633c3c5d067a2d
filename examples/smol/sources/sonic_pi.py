"""Samples of Sonic Pi (CC0), labelled with the kind of instrument by their file names."""

from pathlib import Path

from examples.smol.item import Item
from examples.smol.recordings import clips_of, is_audible

SOURCE = "sonic_pi"
PACKAGE = "sonic-pi-samples"
KINDS = {
    "bass": "bass",
    "bd": "bass drum",
    "drum": "drum",
    "elec": "electronic sound",
    "glitch": "glitch",
    "guit": "guitar",
    "loop": "drum loop",
    "perc": "percussion",
    "sn": "snare drum",
    "tabla": "tabla",
    "vinyl": "vinyl record",
}
"""Label by the first part of the file name; files with other names are of mixed kinds."""


def sounds(package: Path) -> list[Item]:
    """Returns the clips of all samples of these kinds.

    Args:
        package: folder of the unpacked Debian package.
    """
    items = []
    for path in sorted(package.rglob("*.flac")):
        kind = KINDS.get(path.stem.split("_")[0])
        if kind and is_audible(path):
            for number, read in enumerate(clips_of(path)):
                items.append(Item(SOURCE, "audio", f"{path.stem}-{number}", kind, path.stem, read))
    return items
