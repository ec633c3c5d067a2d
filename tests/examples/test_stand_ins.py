"""The encoders beside the demo, as recipes name them."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from examples.stand_ins import aisfx
from examples.stand_ins.aisfx import AisfxAudioEncoder
from examples.stand_ins.efficientnet_lite import EfficientNetLite0
from unimoe_kernels.testing import relative_error
from unimoe_model.assets import MissingAssetError
from unimoe_model.encoders import empty_encoder
from unimoe_model.encoders.outside import permit_encoder

STAND_INS = Path(__file__).resolve().parents[2] / "examples" / "stand_ins"
SIZES = {"vision": 1280, "audio": 512}


@pytest.mark.parametrize("sense", SIZES)
def test_the_file_names_encoders(sense):
    names = yaml.safe_load((STAND_INS / "encoders.yaml").read_text())
    permit_encoder(names[sense], STAND_INS)
    assert empty_encoder(names[sense], sense).feature_size == SIZES[sense]


def test_recordings_of_any_length_are_encoded_together(monkeypatch):
    monkeypatch.setattr(aisfx, "PIECE_SAMPLES", 50_000)
    encoder = AisfxAudioEncoder()
    rng = np.random.default_rng(0)
    lengths = [40_000, 30_000, 40_000, 50_000 + 20_000, 40_000, 50_000 + 100]
    recordings = [rng.standard_normal(length).astype(np.float32) for length in lengths]
    together = encoder.encode_recordings(recordings)
    assert [len(pieces) for pieces in together] == [1, 1, 1, 2, 1, 1]
    assert [pieces[-1].shape[0] for pieces in together] == [5, 3, 5, 2, 5, 6]
    for recording, pieces in zip(recordings, together, strict=True):
        for piece, alone in zip(pieces, encoder.encode_recording(recording), strict=True):
            assert piece.dtype == torch.float32
            assert relative_error(piece, alone.double()) < 1e-5
    assert encoder.encode_recordings([]) == []


def test_the_middle_of_a_picture_is_seen():
    pytest.importorskip("PIL", reason="pillow is not installed: pip install .[demo]")
    encoder = EfficientNetLite0()
    generator = torch.Generator().manual_seed(0)
    square = torch.randint(0, 256, (96, 96, 3), dtype=torch.uint8, generator=generator)
    wide = torch.zeros(96, 130, 3, dtype=torch.uint8)
    wide[:, 17:113] = square
    features = encoder.encode_pictures([wide, square])
    assert features.shape == (2, 9, 1280)
    assert torch.equal(features[0], features[1])


@pytest.mark.parametrize("encoder", [AisfxAudioEncoder, EfficientNetLite0])
def test_missing_weights_are_named(monkeypatch, encoder):
    monkeypatch.setattr("unimoe_model.assets.find_spec", lambda _: None)
    with pytest.raises(MissingAssetError, match=r"requirements/demo-assets\.txt"):
        encoder.pretrained()
