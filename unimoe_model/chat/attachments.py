"""Files of media as messages of a conversation take them, and what a user is told of them."""

from dataclasses import dataclass
from pathlib import Path

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
        size = f"{read.shape[1]} x {read.shape[0]} pixels"
    elif kind == "video":
        read = as_video(path, processor.video_num_frames, kind, frame_seed)
        size = f"{len(read)} frames of {read.shape[2]} x {read.shape[1]} pixels"
    else:
        rate = processor.sample_rate(kind)
        read = as_recording(path, rate, kind)
        size = f"{len(read) / rate:.1f} s"
    media = processor.encode(kind, read)
    soft_tokens = len(media.pieces) * processor.num_soft_tokens[kind]
    return Attachment(kind, media, f"{kind}: {size}, {soft_tokens} soft tokens")
