"""An item of a source: a picture or a recording, and its labels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Item:
    """A picture, a spoken phrase or a sound.

    Attributes:
        source: name of the source, as in `credits.CREDITS`.
        kind: `"image"`, `"speech"` or `"audio"`.
        name: name that is unique within the source, also used for the file.
        label: the thing shown, the words spoken or the source of the sound.
        group: items of a group, such as two pictures of one thing, are held out together.
        category: kind of thing, if given by the source.
        make: returns the picture (`PIL.Image`, with transparency if it has any), or `[samples]`
            float32 and the sampling rate.
    """

    source: str
    kind: str
    name: str
    label: str
    group: str
    make: Callable[[], Any]
    category: str = ""
