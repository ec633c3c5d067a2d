"""An item of a source: something to look at or listen to, and what is known about it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Item:
    """A picture, a spoken phrase or a sound.

    Attributes:
        source: name of its source, as in `credits.CREDITS`.
        kind: `"image"`, `"speech"` or `"audio"`.
        name: unique among the items of the source; its file is named like it.
        label: what it shows, says or sounds like.
        group: items that are only held out together, such as two pictures of one thing.
        category: what kind of thing it is, where the source says.
        make: picture (`PIL.Image` with transparency where it has some) or `[samples]` float32 and
            samples a second.
    """

    source: str
    kind: str
    name: str
    label: str
    group: str
    make: Callable[[], Any]
    category: str = ""
