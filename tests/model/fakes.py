"""Encoders without weights, whose features depend only on their input."""

import torch
from torch.nn.functional import pad

from unimoe_model.encoders import FrozenEncoder


class _Fake(FrozenEncoder):
    @classmethod
    def pretrained(cls):
        return cls()


class FakeVision(_Fake):
    """Three patches of 12 features: the mean of each colour, scaled; one more where padded."""

    def __init__(self):
        super().__init__("fake", 12)

    def encode_pictures(self, pictures, pad_to_square=False):
        means = torch.stack([picture.float().mean((0, 1)) / 255 for picture in pictures])
        scales = torch.arange(1.0, 37.0).reshape(3, 12)
        return means.repeat(1, 4)[:, None] * scales + float(pad_to_square)


class FakeSpeech(_Fake):
    """A row for every 10 samples that holds the sum of their piece."""

    sample_rate = 16000

    def __init__(self):
        super().__init__("fake", 16)

    def encode_recording(self, samples, max_rows):
        pieces = torch.from_numpy(samples).split(10 * max_rows)
        rows = [piece.sum().expand(-(-len(piece) // 10), 16) for piece in pieces]
        return [pad(row, (0, 0, 0, max_rows - len(row))) for row in rows]


class FakeAudio(_Fake):
    """A row for every 10 samples that holds the sum of their piece, in pieces of 50 samples."""

    sample_rate = 44100

    def __init__(self):
        super().__init__("fake", 10)

    def encode_recording(self, samples):
        pieces = torch.from_numpy(samples).split(50)
        return [piece.sum().expand(-(-len(piece) // 10), 10) for piece in pieces]


FAKES = {
    ("vision", "fake-vision"): FakeVision(),
    ("speech", "fake-speech"): FakeSpeech(),
    ("audio", "fake-audio"): FakeAudio(),
}
