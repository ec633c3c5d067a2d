"""The process that decodes media: checks sizes in headers before it decodes a file.

It is killed when it takes too long, and the kernel limits its memory. It sends back a JSON object
and raw samples, so that a compromised decoder cannot execute code in the server.
"""

import io
import json
import os
import resource
import signal
import struct
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from unimoe_model.data.media_items import as_picture, as_recording, as_video
from unimoe_model.extras import needed_by
from unimoe_model.serve.limits import Limits

with needed_by("decoding media", "serve"):
    import soundfile
    from PIL import Image

PICTURES = ("PNG", "JPEG", "MPO", "BMP", "GIF", "WEBP", "TIFF", "AVIF")
"""Accepted picture formats. Pillow's other readers include one that runs Ghostscript, and many for
rare formats."""

# FFmpeg also reads playlists, which can refer to other files and URLs: only containers are opened.
_VIDEO_MAGIC = {
    4: (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"),
    0: (b"\x1aE\xdf\xa3", b"RIFF", b"OggS", b"FLV\x01", b"\0\0\1\xba", b"\0\0\1\xb3", b"\x47"),
}
_RATES = (1000, 768_000)


def work(connection: Connection, limits: Limits) -> None:
    """Decodes files received through the connection until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Image.init()
    Image.ID[:] = [name for name in Image.ID if name in PICTURES]
    Image.MAX_IMAGE_PIXELS = None  # the check below names the limit in its error
    _bound_memory(limits.decoding_bytes)
    connection.send_bytes(b"{}")
    while True:
        try:
            request = json.loads(connection.recv_bytes())
            source = request.pop("path") or connection.recv_bytes()
        except EOFError:
            return
        try:
            array = _decode(source, limits=limits, **request)
        except Exception as error:
            text = _message(error, request["kind"], limits)
            connection.send_bytes(json.dumps({"error": text}).encode())
        else:
            shape = {"shape": array.shape, "dtype": array.dtype.str}
            connection.send_bytes(json.dumps(shape).encode())
            connection.send_bytes(memoryview(array).cast("B"))
            del array
        del source


def _message(error: Exception, kind: str, limits: Limits) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return f"{kind} takes more memory than {limits.decoding_bytes >> 20} MiB to decode"
        cause = cause.__cause__
    # In errors, readers name their source by its type.
    return str(error).replace("file <BytesIO>", "file") or repr(error)


def _bound_memory(most: int) -> None:
    page_size = os.sysconf("SC_PAGE_SIZE")
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * page_size
    resource.setrlimit(resource.RLIMIT_AS, (mapped + most, mapped + most))


def _decode(
    source: str | bytes,
    kind: str,
    sample_rate: int,
    num_frames: int,
    frame_seed: int | None,
    padded: bool,
    limits: Limits,
) -> np.ndarray:
    content = io.BytesIO(source if isinstance(source, bytes) else Path(source).read_bytes())
    if kind == "image":
        with _picture(content) as image:
            require_size(kind, image.size, limits, padded)
        return np.ascontiguousarray(as_picture(_rewound(content), "picture").numpy())
    if kind == "video":
        _probe_video(content, limits, padded)
        frames = as_video(_rewound(content), num_frames, "video", frame_seed)
        return np.ascontiguousarray(frames.numpy())
    _probe_recording(content, kind, limits)
    return np.ascontiguousarray(as_recording(_rewound(content), sample_rate, kind))


def _rewound(content: io.BytesIO) -> io.BytesIO:
    content.seek(0)
    return content


def _picture(content: io.BytesIO) -> Image.Image:
    try:
        return Image.open(_rewound(content), formats=PICTURES)
    except Exception as error:  # Pillow's readers raise errors of many kinds
        raise ValueError(
            "image must be a picture such as PNG or JPEG; this file is none"
        ) from error


def require_size(kind: str, size: tuple[int, int], limits: Limits, padded: bool) -> None:
    """Raises ValueError for pictures and frames that are too large."""
    width, height = size
    pixels = max(size) ** 2 if padded else width * height
    if pixels > limits.pixels or max(size) > limits.side:
        square = " when padded to a square" if padded and width != height else ""
        raise ValueError(
            f"{kind} ({width:,} x {height:,} pixels{square}) must have at most {limits.pixels:,}"
            f" pixels and {limits.side:,} a side"
        )


def _require_seconds(kind: str, seconds: float, limits: Limits) -> None:
    if not seconds <= limits.seconds:
        raise ValueError(f"{kind} ({seconds:,.0f} s) must last at most {limits.seconds:,.0f} s")


def _probe_video(content: io.BytesIO, limits: Limits, padded: bool) -> None:
    head = content.getvalue()[:16]
    try:
        with Image.open(_rewound(content), formats=PICTURES) as image:
            require_size("video", image.size, limits, padded)
        return
    except ValueError:
        raise
    except Exception:
        pass  # not a picture: FFmpeg reads it
    if not any(head[at:].startswith(magics) for at, magics in _VIDEO_MAGIC.items()):
        raise ValueError(
            "video must be an MP4, WebM, MKV, AVI, OGG, MPEG or GIF; this file is none"
        )
    with needed_by("reading videos", "serve"):
        import av
    try:
        with av.open(_rewound(content)) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise ValueError("it has no pictures")
            size = stream.codec_context.width, stream.codec_context.height
            duration = (container.duration or 0) / av.time_base
    except Exception as error:
        raise ValueError(f"video must be whole and readable: {error}") from error
    require_size("video", size, limits, padded)
    _require_seconds("video", duration, limits)


def _probe_recording(content: io.BytesIO, kind: str, limits: Limits) -> None:
    claimed = wav_seconds(content.getvalue())
    if claimed is not None:
        _require_seconds(kind, claimed, limits)
    try:
        info = soundfile.info(_rewound(content))
    except Exception as error:  # soundfile's own errors and TypeError
        raise ValueError(
            f"{kind} must be a recording such as WAV, FLAC, OGG or MP3; this file is none"
        ) from error
    if not _RATES[0] <= info.samplerate <= _RATES[1]:
        raise ValueError(
            f"{kind} ({info.samplerate:,} samples a second) must have {_RATES[0]:,} to"
            f" {_RATES[1]:,}"
        )
    _require_seconds(kind, info.frames / info.samplerate, limits)
    if info.frames * info.channels > limits.samples:
        raise ValueError(
            f"{kind} ({info.frames:,} samples of {info.channels} channels) must have at most"
            f" {limits.samples:,} samples"
        )


def wav_seconds(content: bytes) -> float | None:
    """Returns the seconds stated by a WAV header, which libsndfile corrects silently.

    None for other files.
    """
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        return None
    at, bytes_a_second = 12, 0
    while at + 8 <= len(content):
        name, size = content[at : at + 4], struct.unpack_from("<I", content, at + 4)[0]
        if name == b"fmt " and at + 20 <= len(content):
            bytes_a_second = struct.unpack_from("<I", content, at + 16)[0]
        elif name == b"data":
            # Browsers and FFmpeg write this size when they stream and do not know it.
            if not bytes_a_second or size == 0xFFFFFFFF:
                return None
            return size / bytes_a_second
        at += 8 + size + size % 2
    return None
