"""Features of media items, and their collation into model inputs."""

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
    """Settings, other than the encoder, that affect the features of an item.

    Attributes:
        video_num_frames: frames sampled from a video.
        speech_max_frames: maximum number of feature frames per piece of speech.
        image_aspect_ratio: `"square"` (centre crop) or `"pad"`.
    """

    video_num_frames: int
    speech_max_frames: int
    image_aspect_ratio: str


@dataclass(frozen=True)
class EncodedMedia:
    """Features of one media item.

    Attributes:
        pieces: features of the encoder, each `[rows, C]` float32, or `[frames, rows, C]` for a
            video; a recording has one or more pieces.
        query_states: whether `pieces` are instead outputs of the connector's body before its
            projector, `[queries, d]` each.
    """

    pieces: tuple[torch.Tensor, ...]
    query_states: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a batch.

    Attributes:
        text: token ids and labels, with expanded placeholders.
        media: kind and features of each item, in the order of the placeholders.
        lengths: number of tokens of each conversation in a packed row; empty for a row of one.
    """

    text: TokenizedText
    media: tuple[tuple[str, EncodedMedia], ...] = ()
    lengths: tuple[int, ...] = ()


def read_media(
    kind: str, item, encoder: FrozenEncoder, options: MediaOptions, frame_seed: int | None = None
) -> torch.Tensor | NDArray:
    """Reads one item into the form that its encoder accepts.

    Args:
        kind: media kind.
        item: a file, or its content in any form that `media_items` accepts.
        encoder: encoder of the media kind.
        options: settings of the features.
        frame_seed: seed for drawing the frames of a video at random; None spaces them evenly.

    Returns:
        uint8 `[H, W, 3]` for an image and `[frames, H, W, 3]` for a video; float32 `[samples]` at
        the encoder's sampling rate for a recording.

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
    """Encodes items returned by `read_media`; returns the pieces of each item."""
    padding = {"pad_to_square": True} if options.image_aspect_ratio == "pad" else {}
    if kind == "image":
        return [[piece] for piece in encoder.encode_pictures(items, **padding)]
    if kind == "video":
        frames = encoder.encode_pictures([frame for video in items for frame in video], **padding)
        return [[piece] for piece in frames.split(options.video_num_frames)]
    rows = (options.speech_max_frames,) if kind == "speech" else ()
    return encoder.encode_recordings(items, *rows)


def stack_media(kind: str, items: Sequence[EncodedMedia]) -> dict[str, torch.Tensor]:
    """Stacks the items of a media kind into model inputs.

    Args:
        kind: media kind.
        items: items in the order of their placeholders, row by row.

    Returns:
        `<kind>_features` `[pieces, ..., rows, C]` float32, zero-padded to the longest piece; if
        lengths differ, also `<kind>_features_mask` `[pieces, rows]` bool, False on padding. For
        query states, `<kind>_query_states` `[pieces, queries, d]`. Empty without items.

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
