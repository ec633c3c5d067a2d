"""Limits on the resources that clients may use."""

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Maximum values of requests, decoding, replies and uploads.

    Attributes:
        body_bytes: bytes of a request body; a longer one is read, discarded and refused.
        body_seconds: seconds to receive a request body.
        items: media items per request.
        characters: characters in all messages of a request.
        pixels: pixels of a picture or frame; for a picture that is padded, those of its square.
        side: pixels of the longer side.
        seconds: duration of a recording or video.
        samples: samples of a recording, summed over channels.
        decoding_seconds: seconds to decode one item, after which its process is killed.
        decoding_bytes: memory of the decoding process.
        queue: requests that wait or are being replied to; further ones receive status 503.
        reply_seconds: seconds per reply, after which it is cut off.
        conversations: conversations of pages that are kept; the least recently used one is dropped.
        uploads_bytes: bytes of files that all clients have uploaded on the page and not yet sent.
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
