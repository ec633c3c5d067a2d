"""Media files attached to messages of a conversation, and their descriptions for the user."""

from dataclasses import dataclass
from pathlib import Path

from numpy.typing import NDArray
from torch import Tensor

from unimoe_model.data.encoded_media import EncodedMedia
from unimoe_model.data.media_items import as_picture, as_recording, as_video
from unimoe_model.processing import UniMoEProcessor


@dataclass(frozen=True)
class Attachment:
    """A media file that has been read and encoded.

    Attributes:
        kind: media kind: `"image"`, `"video"`, `"speech"` or `"audio"`.
        media: features, accepted by `Conversation.reply`.
        description: kind, size or duration, and number of soft tokens.
    """

    kind: str
    media: EncodedMedia
    description: str


def attach(
    processor: UniMoEProcessor, kind: str, path: Path, frame_seed: int | None = None
) -> Attachment:
    """Reads and encodes a media file.

    Args:
        processor: the model's processor.
        kind: media kind.
        path: file, or for a video a folder of pictures.
        frame_seed: seed for drawing the frames of a video at random; None spaces them evenly.

    Raises:
        ValueError: If the file does not exist or cannot be read.
        ModuleNotFoundError: If the package that reads the format is not installed.
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
    """Encodes media that are already in memory.

    Args:
        processor: the model's processor.
        kind: media kind.
        read: pixels `[H, W, 3]` or `[frames, H, W, 3]` uint8, or `[samples]` float32 at the
            sampling rate of the encoder of `kind`.
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
