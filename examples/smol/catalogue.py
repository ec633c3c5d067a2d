"""The items of all available sources."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from examples.smol.debian import wanted_versions
from examples.smol.item import Item
from examples.smol.sources import (
    conversations,
    drawings,
    instructions,
    people,
    photographs,
    sonic_pi,
    stamps,
)
from examples.smol.sources.conversations import Prompt
from examples.smol.sources.emoji_names import emoji_names
from examples.smol.sources.instructions import Instruction


@dataclass(frozen=True)
class Catalogue:
    """Items by use; sources that are not available have none.

    Attributes:
        drawings: drawings by style.
        stamps: pictures.
        photographs: pictures, all held out.
        sounds: recordings of the stamps and of Sonic Pi.
        descriptions: recordings of people, with transcripts.
        words: single words spoken by a person, all held out.
        sentences: sentences spoken by people, all held out.
        instructions: instructions that speech is synthesised from.
        prompts: prompts that the language model replies to.
    """

    drawings: dict[str, list[Item]]
    stamps: list[Item] = field(default_factory=list)
    photographs: list[Item] = field(default_factory=list)
    sounds: list[Item] = field(default_factory=list)
    descriptions: list[Item] = field(default_factory=list)
    words: list[Item] = field(default_factory=list)
    sentences: list[Item] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)


def debian_folders(folder: Path) -> dict[str, Path]:
    """Returns the folders of the packages that `unpack_packages` has unpacked into a folder."""
    return {name: folder / name for name in wanted_versions() if (folder / name).is_dir()}


def load_catalogue(debian: Path) -> Catalogue:
    """Lists the items of packages that are installed from PyPI or unpacked from Debian.

    Args:
        debian: folder of the unpacked packages.

    Raises:
        MissingAssetError: If a package from PyPI is not installed.
    """
    folders = debian_folders(debian)

    def of(package: str, read) -> list[Item]:
        return read(folders[package]) if package in folders else []

    names = frozenset(emoji_names().values())
    styles = {"openmoji": drawings.drawings("openmoji")}
    for style, package in drawings.PACKAGES.items():
        styles[style] = of(package, lambda folder, style=style: drawings.drawings(style, folder))
    return Catalogue(
        drawings=styles,
        stamps=of(stamps.PACKAGE, lambda folder: stamps.pictures(folder, names)),
        photographs=photographs.pictures(),
        sounds=of(stamps.PACKAGE, stamps.sounds) + of(sonic_pi.PACKAGE, sonic_pi.sounds),
        descriptions=of(stamps.PACKAGE, stamps.descriptions),
        words=of(people.PACKAGES["asterisk"], people.words),
        sentences=of(people.PACKAGES["pocketsphinx"], people.sentences),
        instructions=instructions.instructions(),
        prompts=conversations.prompts(),
    )


def split_groups(catalogue: Catalogue) -> dict[str, set[str]]:
    """Returns the groups of each set that has held-out groups."""
    return {
        "stamps": {item.group for item in catalogue.stamps},
        "sounds": {f"{item.source} {item.group}" for item in catalogue.sounds},
        "descriptions": {item.group for item in catalogue.descriptions},
        "instructions": {item.group for item in catalogue.instructions},
        "prompts": {prompt.name for prompt in catalogue.prompts},
    }


def is_held_out(split: Mapping[str, frozenset[str]], name: str, group: str) -> bool:
    """Returns whether a group of a set is held out."""
    return group in split.get(name, frozenset())
