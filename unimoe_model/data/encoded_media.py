"""Features of media items, and how they become the inputs of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from numpy.typing import NDArray

from unimoe_model.data.media_items import as_picture, as_recording, as_video
from unimoe_model.encoders import FrozenEncoder
from unimoe_model.tokenization import TokenizedText

ASPECT_RATIOS = ("square", "pad")
SENSES = {"image": "vision", "video": "vision", "speech": "speech", "audio": "audio"}
"""The encoder that reads each media kind."""


@dataclass(frozen=True)
class MediaOptions:
    """What decides the features of an item beside its encoder.

    Attributes:
        video_num_frames: frames of a video.
        speech_max_frames: feature rows of a piece of speech.
        image_aspect_ratio: one of `ASPECT_RATIOS`.
    """

    video_num_frames: int
    speech_max_frames: int
    image_aspect_ratio: str


@dataclass(frozen=True)
class EncodedMedia:
    """What the model is given of one item of media.

    Attributes:
        pieces: features of the encoder, `[rows, C]` float32 each, `[frames, rows, C]` of a video;
            a recording has one or several.
        query_states: whether they are what the connector has before its projector instead,
            `[queries, d]`.
    """

    pieces: tuple[torch.Tensor, ...]
    query_states: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a batch.

    Attributes:
        text: with expanded placeholders.
        media: kind and features of each item, in the order of the placeholders.
        lengths: tokens of each conversation of a packed row; empty where the row is one.
    """

    text: TokenizedText
    media: tuple[tuple[str, EncodedMedia], ...] = ()
    lengths: tuple[int, ...] = ()


def read_media(
    kind: str, item, encoder: FrozenEncoder, options: MediaOptions, frame_seed: int | None = None
) -> torch.Tensor | NDArray:
    """One item as its encoder takes it.

    Args:
        kind: media kind.
        item: a file or what was read from it; `media_items` says what is accepted.
        encoder: of the kind's sense.
        options: see there.
        frame_seed: None chooses the frames of a video evenly, a number at random.

    Raises:
        ValueError: If the item is empty, unreadable or has a wrong shape.
    """
    if kind == "image":
        return as_picture(item, "images")
    if kind == "video":
        return as_video(item, options.video_num_frames, "videos", frame_seed)
    return as_recording(item, encoder.sample_rate, kind)


def encode_media(
    kind: str, items: Sequence, encoder: FrozenEncoder, options: MediaOptions
) -> list[list[torch.Tensor]]:
    """Runs the frozen encoder over items that `read_media` gave; the pieces of each."""
    padding = {"pad_to_square": True} if options.image_aspect_ratio == "pad" else {}
    if kind == "image":
        return [[piece] for piece in encoder.encode_pictures(items, **padding)]
    if kind == "video":
        frames = encoder.encode_pictures([frame for video in items for frame in video], **padding)
        return [[piece] for piece in frames.split(options.video_num_frames)]
    rows = (options.speech_max_frames,) if kind == "speech" else ()
    return encoder.encode_recordings(items, *rows)


def stack_media(kind: str, items: Sequence[EncodedMedia]) -> dict[str, torch.Tensor]:
    """Model inputs of the items of a kind.

    Args:
        kind: media kind.
        items: in the order of their placeholders, row by row.

    Returns:
        `<kind>_features` `[pieces, ..., rows, C]`, filled up with zeros to the longest; where some
        are shorter, `<kind>_features_mask` `[pieces, rows]` bool, False on what was filled up. Of
        query states, `<kind>_query_states` `[pieces, queries, d]`. Nothing without items.

    Raises:
        ValueError: If some items are query states and others are not.
    """
    if not items:
        return {}
    if len({item.query_states for item in items}) > 1:
        raise ValueError(f"{kind} items of a batch must all be features or all be query states")
    pieces = [piece for item in items for piece in item.pieces]
    if items[0].query_states:
        return {f"{kind}_query_states": torch.stack(pieces)}
    rows = [piece.shape[-2] for piece in pieces]
    most = max(rows)
    filled = [
        torch.nn.functional.pad(piece, (0, 0, 0, most - count))
        for piece, count in zip(pieces, rows, strict=True)
    ]
    batch = {f"{kind}_features": torch.stack(filled)}
    if min(rows) < most:
        positions = rearrange(torch.arange(most), "n -> 1 n")
        batch[f"{kind}_features_mask"] = positions < rearrange(torch.tensor(rows), "b -> b 1")
    return batch
