"""Media decoded in a process that can be killed; bounds are checked before decoding."""

import io
import os
import signal
import struct
import wave
import zlib

import numpy as np
import pytest

pytest.importorskip("scipy", reason="scipy is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("av", reason="av is not installed: pip install .[media]")
from conversing import processor_of
from PIL import Image

from unimoe_model.data.media_items import as_picture, as_recording, as_video
from unimoe_model.serve import decoding_worker
from unimoe_model.serve.decoding import MediaDecoder
from unimoe_model.serve.decoding_worker import wav_seconds
from unimoe_model.serve.examples import make_example
from unimoe_model.serve.limits import Limits

LIMITS = Limits(pixels=1_000_000, side=2000, seconds=30, decoding_seconds=20)


def huge_png(width=100_000, height=100_000):
    """A picture of one colour, whose pixels compress to a few kilobytes."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(8_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def wav(samples=100, rate=16000, claimed=None):
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((9000 * np.sin(np.arange(samples))).astype("<i2").tobytes())
    found = bytearray(content.getvalue())
    if claimed is not None:
        found[40:44] = struct.pack("<I", claimed)
    return bytes(found)


def png(size=(20, 30), color="red"):
    content = io.BytesIO()
    Image.new("RGB", size, color).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def decoder(tokenizer, request):
    """One process for all tests here; some of them kill it."""
    config = request.getfixturevalue("module_config")
    found = MediaDecoder(processor_of(config, tokenizer), LIMITS)
    yield found
    found.close()


@pytest.fixture(scope="module")
def module_config():
    class Named:
        """What a processor reads of a model."""

        class config:  # noqa: N801
            vision_encoder, speech_encoder, audio_encoder = (
                "fake-vision",
                "fake-speech",
                "fake-audio",
            )
            video_num_frames, speech_max_frames = 2, 6

            @staticmethod
            def num_soft_tokens(kind):
                return 3

    return Named


@pytest.fixture(autouse=True)
def _fakes(encoders):
    pass


def test_it_decodes_what_the_processor_would(decoder, tmp_path):
    picture = png()
    np.testing.assert_array_equal(decoder.read("image", picture), as_picture(picture, "images"))
    for kind, rate in (("speech", 16000), ("audio", 44100)):
        found = decoder.read(kind, wav(rate=16000))
        assert found.dtype == np.float32
        assert np.abs(found).max() > 0.1
        np.testing.assert_array_equal(found, as_recording(wav(rate=16000), rate, kind))
    video = make_example("video", tmp_path)
    found = decoder.read("video", video)
    np.testing.assert_array_equal(found, as_video(video, 2, "videos"))
    assert found.shape == (2, 192, 192, 3)
    assert found[0].std() > 10


REFUSED = {
    "no picture": ("image", b"hello", "image must be a picture such as PNG or JPEG"),
    "no sound": ("speech", png(), "speech must be a recording such as WAV"),
    "no video": ("video", wav(), "video must be "),
    "a playlist": ("video", b"#EXTM3U\nhttp://127.0.0.1/a.ts\n", "this file is none"),
    "a script for Ghostscript": ("image", b"%!PS-Adobe-3.0 EPSF-3.0\n", "this file is none"),
    "cut short": ("image", png((300, 300))[:120], "must be a whole picture"),
    "many pixels": (
        "image",
        huge_png(),
        r"image \(100,000 x 100,000 pixels\) must have at most 1,000,000 pixels",
    ),
    "a long side": ("image", png((2001, 1)), r"image \(2,001 x 1 pixels\)"),
    "frames of many pixels": ("video", huge_png(), r"video \(100,000 x 100,000 pixels\)"),
    "hours that are claimed": (
        "speech",
        wav(claimed=4 * 3600 * 32000),
        r"speech \(14,400 s\) must last at most 30 s",
    ),
    "too long": ("audio", wav(31 * 16000), r"audio \(31 s\) must last at most 30 s"),
    "a rate of nothing": ("speech", wav(10, rate=1), r"speech \(1 samples a second\) must have"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(decoder, case):
    kind, content, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        decoder.read(kind, content)
    assert decoder.read("image", png()).shape == (30, 20, 3)


def test_the_picture_that_is_refused_is_small():
    assert len(huge_png()) < 10_000


def test_files_beyond_the_byte_limit_are_not_read(tokenizer, module_config, tmp_path):
    path = tmp_path / "much.png"
    with path.open("wb") as file:
        file.truncate(3 * 2**30)
    decoder = MediaDecoder(processor_of(module_config, tokenizer), LIMITS)
    with pytest.raises(ValueError, match=r"image \(3,221,225,472 bytes\) must have at most"):
        decoder.read("image", path)
    assert decoder._process is None


def test_one_that_takes_too_long_is_killed(tokenizer, module_config):
    decoder = MediaDecoder(processor_of(module_config, tokenizer), LIMITS)
    decoder.read("image", png())
    process = decoder._process
    os.kill(process.pid, signal.SIGSTOP)  # as one that never ends
    object.__setattr__(decoder._limits, "decoding_seconds", 0.05)
    try:
        with pytest.raises(ValueError, match=r"image must be decoded within 0\.05 s"):
            decoder.read("image", png())
    finally:
        object.__setattr__(decoder._limits, "decoding_seconds", 20)
    assert process.exitcode == -signal.SIGKILL
    assert decoder.read("image", png()).shape == (30, 20, 3)
    decoder.close()


def test_one_that_dies_is_started_again(decoder):
    decoder.read("image", png())
    os.kill(decoder._process.pid, signal.SIGKILL)
    decoder._process.join()
    assert decoder.read("image", png()).shape == (30, 20, 3)


def test_memory_beyond_its_share_is_refused(decoder):
    limits = Limits(decoding_bytes=16 * 2**20)
    small = MediaDecoder(decoder._processor, limits)
    try:
        with pytest.raises(ValueError, match="image takes more memory than 16 MiB"):
            small.read("image", png((4000, 4000)))
        assert small.read("image", png()).shape == (30, 20, 3)
    finally:
        small.close()


def test_padded_pictures_are_counted_as_squares():
    decoding_worker.require_size("image", (2000, 400), LIMITS, padded=False)
    with pytest.raises(ValueError, match=r"\(2,000 x 400 pixels when padded to a square\)"):
        decoding_worker.require_size("image", (2000, 400), LIMITS, padded=True)


def test_what_wav_headers_claim():
    assert wav_seconds(wav(32000)) == 2.0
    assert wav_seconds(wav(claimed=320_000)) == 10.0
    assert wav_seconds(wav(claimed=0xFFFFFFFF)) is None  # streamed, of unknown length
    assert wav_seconds(png()) is None
    assert wav_seconds(wav()[:30]) is None
