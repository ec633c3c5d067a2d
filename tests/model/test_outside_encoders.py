"""Encoders named `module:Class`, whose code runs only with permission."""

import sys
import warnings

import pytest

from unimoe_model.encoders import build_encoder, empty_encoder, outside

MODULE = """
import torch
from unimoe_model.encoders import FrozenEncoder

class Eyes(FrozenEncoder):
    def __init__(self):
        super().__init__("eyes", 6, picture_tokens=4)
        self.layer = torch.nn.Linear(3, 6)
        self.freeze()

    @classmethod
    def pretrained(cls):
        return cls()

class Plain:
    pass
"""


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(outside, "_PERMITTED", set())
    monkeypatch.setattr(outside, "_CHOSEN", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("own_eyes", None)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "own_eyes.py").write_text(MODULE)
    return tmp_path


def test_a_name_alone_makes_no_code_run(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    for build in (build_encoder, empty_encoder):
        with pytest.raises(ValueError, match=r"vision encoder \(own_eyes:Eyes\) is code outside"):
            build("own_eyes:Eyes", "vision")
    assert "own_eyes" not in sys.modules


def test_a_permitted_class_is_built(folder):
    outside.permit_encoder("own_eyes:Eyes", folder)
    encoder = build_encoder("own_eyes:Eyes", "vision")
    assert (encoder.feature_size, encoder.picture_tokens) == (6, 4)
    assert not encoder.layer.weight.requires_grad
    assert empty_encoder("own_eyes:Eyes", "vision").layer.weight.is_meta


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_eyes:Nose", "cannot be imported"),
        ("no_such:Eyes", "cannot be imported: No module named 'no_such'"),
        ("own_eyes:Plain", "must be a subclass of FrozenEncoder"),
    ],
)
def test_a_class_that_is_none_is_refused(folder, name, message):
    outside.permit_encoder(name, folder)
    with pytest.raises(ValueError, match=message):
        build_encoder(name, "vision")


def test_a_file_chooses_the_encoders_of_a_process(folder):
    (folder / "encoders.yaml").write_text("vision: own_eyes:Eyes\n")
    outside.choose_encoders(folder / "encoders.yaml")
    replaced = r"own_eyes:Eyes\) replaces clip-vit-large-patch14-336, which the model names"
    with pytest.warns(UserWarning, match=replaced):
        assert build_encoder("clip-vit-large-patch14-336", "vision").name == "eyes"


@pytest.mark.parametrize("named", ["own_eyes:Eyes", "folder/of/clip"])
def test_a_class_in_the_place_of_itself_or_of_a_folder_is_no_reason_for_a_warning(folder, named):
    (folder / "encoders.yaml").write_text("vision: own_eyes:Eyes\n")
    outside.choose_encoders(folder / "encoders.yaml")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build_encoder(named, "vision").name == "eyes"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("smell: a:B", "must map vision, speech, audio to names, got {'smell': 'a:B'}"),
        ("vision: 3", "must map vision"),
        ("", "must map vision"),
        ("a: [", "must be a readable YAML file"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, text, message):
    (tmp_path / "encoders.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"encoders \(.*encoders.yaml\)") as error:
        outside.choose_encoders(tmp_path / "encoders.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["clip", "a/b.pt", "C:", ":B", "a:", "a b:C", "../a:B"])
def test_other_names_are_no_classes(name):
    assert not outside.is_outside(name)
