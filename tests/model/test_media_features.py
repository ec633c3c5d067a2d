"""Features of a stage's media, and outputs of frozen connector bodies."""

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
import soundfile
from fakes import FAKES

from unimoe_kernels.testing import relative_error
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.training import features
from unimoe_model.training.progress import SilentReporter


@pytest.fixture
def recordings(tmp_path):
    """One of two audio pieces of unequal length, one of one."""
    paths = []
    for number, samples in enumerate((70, 50)):
        paths.append(tmp_path / f"{number}.wav")
        soundfile.write(paths[-1], np.full(samples, 0.1 * (number + 1), np.float32), 44100)
    return paths


@pytest.fixture
def build(tiny_config, tokenizer, encoders, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "build_encoder", lambda name, sense: FAKES[sense, name])
    processor = UniMoEProcessor.from_config(tiny_config(), tokenizer)

    def make():
        device = torch.device("cpu")
        return features.MediaFeatures(
            processor, tmp_path / "features", device, "fp32", SilentReporter()
        )

    return processor, make


def test_items_are_what_the_processor_encodes(build, recordings):
    processor, make = build
    stored = make()
    stored.prepare([("audio", path) for path in recordings])
    for path in recordings:
        expected, found = processor.encode("audio", path), stored.item("audio", path)
        assert not found.query_states
        assert [p.shape for p in found.pieces] == [p.shape for p in expected.pieces]
        for got, piece in zip(found.pieces, expected.pieces, strict=True):
            assert torch.equal(got, piece.half().float())


def test_a_second_start_encodes_nothing(build, recordings, monkeypatch):
    _, make = build
    make().prepare([("audio", path) for path in recordings])
    monkeypatch.setattr(type(FAKES["audio", "fake-audio"]), "encode_recording", None)
    again = make()
    again.prepare([("audio", path) for path in recordings])
    assert len(again.item("audio", recordings[0]).pieces) == 2


def test_query_states_are_those_of_the_connector(build, recordings, tiny_model):
    _, make = build
    model, stored = tiny_model(), make()
    media = [("audio", path) for path in recordings]
    stored.prepare(media)
    pieces = {path: stored.item("audio", path).pieces for path in recordings}
    assert [len(piece) for piece in pieces[recordings[0]]] == [5, 2]
    stored.use_query_states(("audio",), model.train(), media)
    connector = model.model.audio_connector
    for path in recordings:
        found = stored.item("audio", path)
        assert found.query_states
        for got, piece in zip(found.pieces, pieces[path], strict=True):
            expected = connector.hidden_states(piece[None])[0]
            assert relative_error(got, expected) < 1e-3
    stored.prepare(media)
    assert not stored.item("audio", recordings[0]).query_states


def test_states_of_other_weights_are_computed_anew(build, recordings, tiny_model):
    _, make = build
    model, stored = tiny_model(), make()
    media = [("audio", recordings[1])]
    states = []
    for _ in range(2):
        stored.prepare(media)
        stored.use_query_states(("audio",), model, media)
        states.append(stored.item("audio", recordings[1]).pieces[0])
        with torch.no_grad():
            model.model.audio_connector.query_tokens.normal_()
    assert relative_error(*states) > 1e-2


def test_a_file_that_cannot_be_read_is_named(build, tmp_path):
    _, make = build
    (tmp_path / "x.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match=r"x\.wav"):
        make().prepare([("audio", tmp_path / "x.wav")])
