"""Training data in tar shards in the layout of WebDataset, read in place.

Consecutive members with the same name up to the first dot form a sample: `0001.json` and its
media, such as `0001.jpg`. The JSON is a conversation or a question, in the format of a line of
`data/conversations.py`; its default id is the sample's name. `image`, `video`, `speech` and
`audio` name members of the sample. A picture or video that is not named is added by its extension;
a sound must be named, because it may be `speech` or `audio`.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from unimoe_model.configuration import MEDIA_KINDS
from unimoe_model.data.conversation_objects import Conversation, conversation_of
from unimoe_model.data.conversations import Conversations
from unimoe_model.data.indexed_files import IndexedFile, TarMember
from unimoe_model.data.tar_index import tar_members
from unimoe_model.evaluation.samples import line_object, named, shown
from unimoe_model.training.progress import ProgressReporter, reported_bytes

_EXTENSIONS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff"), "image"),
    **dict.fromkeys(("mp4", "webm", "mkv", "mov", "avi"), "video"),
}
"""Media kind by extension. GIFs are left out, because they may be pictures or videos."""


def read_shards(paths: Sequence[Path], reporter: ProgressReporter | None = None) -> Conversations:
    """Opens uncompressed tar shards after checking all of their samples.

    Args:
        paths: paths of the shards, in order.
        reporter: shows progress for long shards.

    Returns:
        The conversations, at least one; a sample's JSON is read again whenever its conversation is
        accessed. Their digest covers the JSON's bytes, and the members' names and sizes.

    Raises:
        ValueError: For the first invalid sample, naming shard and sample; or if a shard is not a
            complete, uncompressed tar.
    """
    shards, kinds, digest = _Shards(paths), Counter(), hashlib.sha256()
    size = sum(path.stat().st_size for path in paths)
    with reported_bytes(reporter, f"check {len(paths)} shards", size) as advance:
        for number in range(len(paths)):
            digest.update(b"shard")
            for conversation, members in shards.scanned(number):
                kinds.update(kind for kind, _ in conversation.media)
                for member in members:
                    digest.update(f"{member.name}\0{member.size}\0".encode())
                digest.update(_json_of(members).open().read())
                advance(members[-1].offset + members[-1].size - members[0].offset)
    if not sum(shards.parts):
        raise ValueError(f"shards ({paths[0]}, {len(paths)} in all) must hold at least one sample")
    return Conversations(shards, shards.parts, kinds, digest.hexdigest()[:16])


class _Shards:
    """The conversations of shards by index; every shard must be scanned first, in order.

    A sample occupies 8 bytes in memory, and each of its members 24 bytes and its name.
    """

    def __init__(self, paths: Sequence[Path]):
        self._files = [IndexedFile.of(path) for path in paths]
        self.parts: list[int] = []
        self._ends = np.empty(0, np.int64)  # of shards, in samples
        self._firsts = array("q", [0])  # member of each sample
        self._offsets, self._sizes = array("q"), array("q")
        self._names, self._name_ends = bytearray(), array("q", [0])

    def __call__(self, index: int) -> Conversation:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        members = [
            TarMember(
                self._files[shard],
                self._names[self._name_ends[at] : self._name_ends[at + 1]].decode(),
                self._offsets[at],
                self._sizes[at],
            )
            for at in range(self._firsts[index], self._firsts[index + 1])
        ]
        return _conversation(members, index + 1)

    def scanned(self, number: int) -> Iterator[tuple[Conversation, list[TarMember]]]:
        """Yields the samples of a shard after checking them, and records their members' offsets."""
        before = len(self._firsts)
        for _, group in groupby(tar_members(self._files[number]), lambda m: sample_name(m.name)):
            members = list(group)
            found = _conversation(members, len(self._firsts))
            for member in members:
                self._offsets.append(member.offset)
                self._sizes.append(member.size)
                self._names += member.name.encode()
                self._name_ends.append(len(self._names))
            self._firsts.append(len(self._offsets))
            yield found, members
        self.parts.append(len(self._firsts) - before)
        self._ends = np.cumsum(self.parts)


def sample_name(member: str) -> str:
    """Name of a member's sample: its path up to the first dot of the file name."""
    folder, slash, file = member.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _json_of(members: Sequence[TarMember]) -> TarMember:
    name = sample_name(members[0].name)
    found = [member for member in members if member.name == f"{name}.json"]
    if len(found) != 1:
        raise ValueError(
            f"must have one member {name}.json, has {len(found)} among"
            f" {[member.name for member in members]}; members of a sample stand next to each other"
        )
    return found[0]


def _conversation(members: Sequence[TarMember], number: int) -> Conversation:
    name = sample_name(members[0].name)
    where = f"{members[0].tar.path} sample {name}"
    with named(where):
        own = _json_of(members)
        media = {member.name: member for member in members if member is not own}
        if len(media) != len(members) - 1:
            raise ValueError(f"members {[m.name for m in members]} must have names of their own")
        fields = line_object(own.open().read().decode())
        fields = {"id": name, **fields, **_with_unnamed(fields, media)}
        return conversation_of(fields, number, lambda file: media[_full(file, media)], where)


def _with_unnamed(fields: dict[str, Any], media: dict[str, TarMember]) -> dict[str, list[str]]:
    """Media that the JSON does not name, by the kind that their extensions determine."""
    given = {kind: fields[kind] for kind in MEDIA_KINDS if kind in fields}
    files = [
        file for value in given.values() for file in (value if type(value) is list else [value])
    ]
    named_already = {_full(file, media) for file in files if isinstance(file, str)}
    added: dict[str, list[str]] = {}
    for file in media:
        if file in named_already:
            continue
        kind = _EXTENSIONS.get(file.rpartition(".")[2].lower())
        if kind is None:
            raise ValueError(
                f"member {file} must be named by {', '.join(MEDIA_KINDS)} of the JSON; its"
                " extension does not tell which it is"
            )
        if kind in given:
            raise ValueError(f"{kind} ({shown(given[kind])}) must name member {file} too")
        added.setdefault(kind, []).append(file)
    return added


def _full(file: str, media: dict[str, TarMember]) -> str:
    """The full name of a member that the JSON names with or without its folder."""
    for name in media:
        if file in (name, name.rpartition("/")[2]):
            return name
    raise ValueError(f"media ({shown(file)}) must be a member of the sample: {list(media)}")
