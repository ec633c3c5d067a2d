"""Bounds on what one client may take from a server."""

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """What is refused, and when a reply ends.

    Attributes:
        body_bytes: of a request; more is read and dropped.
        body_seconds: until a request's body must be here.
        items: media of a request.
        characters: of all messages of a request.
        pixels: of a picture or frame; of a picture that is padded, those of its square.
        side: pixels of the longer side.
        seconds: duration of a recording or video.
        samples: of a recording, all channels counted.
        decoding_seconds: for one item, after which its process is killed.
        decoding_bytes: memory that decoding may take.
        queue: requests that wait or are replied to; further ones get 503.
        reply_seconds: for one reply, after which it is cut off.
        conversations: pages that are remembered; the one used longest ago is forgotten.
        uploads_bytes: files of the page that were uploaded and not sent yet, of all clients.
    """

    body_bytes: int = 32 * MIB
    body_seconds: float = 60.0
    items: int = 16
    characters: int = 1_000_000
    pixels: int = 64_000_000
    side: int = 16_384
    seconds: float = 300.0
    samples: int = 60_000_000
    decoding_seconds: float = 20.0
    decoding_bytes: int = 2048 * MIB
    queue: int = 16
    reply_seconds: float = 120.0
    conversations: int = 16
    uploads_bytes: int = 512 * MIB
