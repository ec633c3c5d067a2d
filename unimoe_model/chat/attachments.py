"""Files of media as messages of a conversation take them, and what a user is told of them."""

from dataclasses import dataclass
from pathlib import Path

from numpy.typing import NDArray
from torch import Tensor

from unimoe_model.data.encoded_media import EncodedMedia
from unimoe_model.data.media_items import as_picture, as_recording, as_video
from unimoe_model.processing import UniMoEProcessor


@dataclass(frozen=True)
class Attachment:
    """A file that was read and encoded.

    Attributes:
        kind: media kind.
        media: what `Conversation.reply` takes.
        description: kind, size or duration, and soft tokens.
    """

    kind: str
    media: EncodedMedia
    description: str


def attach(
    processor: UniMoEProcessor, kind: str, path: Path, frame_seed: int | None = None
) -> Attachment:
    """Reads a file and encodes it.

    Args:
        processor: of the model.
        kind: media kind.
        path: file, or for a video a folder of pictures.
        frame_seed: None chooses the frames of a video evenly, a number at random.

    Raises:
        ValueError: If there is no such file, or it cannot be read.
        ModuleNotFoundError: If a package is missing that reads it.
    """
    if not path.exists():
        raise ValueError(f"{kind} ({path}) must be a file; there is no such file")
    if kind == "image":
        read = as_picture(path, kind)
    elif kind == "video":
        read = as_video(path, processor.video_num_frames, kind, frame_seed)
    else:
        read = as_recording(path, processor.sample_rate(kind), kind)
    return attach_read(processor, kind, read)


def attach_read(processor: UniMoEProcessor, kind: str, read: Tensor | NDArray) -> Attachment:
    """Encodes what was read from a file.

    Args:
        processor: of the model.
        kind: media kind.
        read: pixels `[H, W, 3]` or `[frames, H, W, 3]` uint8, or `[samples]` float32 at the rate of
            the kind's encoder.
    """
    if kind == "image":
        size = f"{read.shape[1]} x {read.shape[0]} pixels"
    elif kind == "video":
        size = f"{len(read)} frames of {read.shape[2]} x {read.shape[1]} pixels"
    else:
        size = f"{len(read) / processor.sample_rate(kind):.1f} s"
    media = processor.encode(kind, read)
    soft_tokens = len(media.pieces) * processor.num_soft_tokens[kind]
    return Attachment(kind, media, f"{kind}: {size}, {soft_tokens} soft tokens")
