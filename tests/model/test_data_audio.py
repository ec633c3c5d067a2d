import itertools
import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="scipy is not installed: pip install .[demo]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[demo]")
import soundfile

from unimoe_model import assets
from unimoe_model.assets import MissingAssetError
from unimoe_model.data import general_midi, spoken
from unimoe_model.data.audio_io import load_wav, resample, save_wav
from unimoe_model.data.feature_cache import FeatureCache


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [module for module in modules if find_spec(module) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"demo assets are not installed: {', '.join(missing)}"
    )


needs_espeak = needs("espeakng_loader")
needs_sampler = needs("pretty_midi", "tinysoundfont")


def tone(frequency: float, seconds: float, rate: int) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(
        np.float32
    )


def loudest_frequency(waveform: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return float(spectrum.argmax() * rate / len(waveform))


# Recordings


def test_wav_comes_back(tmp_path):
    waveform = tone(440, 0.3, 16_000)
    save_wav(tmp_path / "a.wav", waveform, 16_000)
    back = load_wav(tmp_path / "a.wav", 16_000)
    assert back.dtype == np.float32
    assert np.abs(back - waveform).max() < 1e-4
    higher = load_wav(tmp_path / "a.wav", 44_100)
    assert len(higher) == 13_230
    assert abs(loudest_frequency(higher, 44_100) - 440) < 4


def test_channels_are_averaged(tmp_path):
    left, right = tone(300, 0.1, 8000), tone(700, 0.1, 8000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 8000)
    assert np.abs(load_wav(tmp_path / "a.wav", 8000) - (left + right) / 2).max() < 1e-4


@given(
    samples=st.integers(0, 500),
    rates=st.tuples(*[st.sampled_from([8000, 16_000, 22_050, 44_100])] * 2),
)
def test_resample_length_and_level(samples, rates):
    rate, new_rate = rates
    result = resample(np.ones(samples, dtype=np.float32), rate, new_rate)
    assert result.dtype == np.float32
    assert len(result) == -(-samples * new_rate // rate)
    if samples >= 300:
        middle = result[len(result) // 3 : 2 * len(result) // 3]
        assert np.abs(middle - 1).max() < 0.02


def test_bad_recordings_are_named(tmp_path):
    (tmp_path / "text.wav").write_text("no recording")
    (tmp_path / "nothing.wav").write_bytes(b"")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 8000)
    soundfile.write(tmp_path / "nan.wav", np.full(9, np.nan, np.float32), 8000, subtype="FLOAT")
    for name, message in {
        "absent.wav": "expected a recording such as wav; there is no such file",
        "text.wav": "expected a readable recording",
        "nothing.wav": "expected a readable recording",
        "empty.wav": "holds no samples",
        "nan.wav": "holds NaN or infinite samples",
    }.items():
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            load_wav(tmp_path / name, 16_000)
    with pytest.raises(ValueError, match="there is no such file"):
        load_wav(tmp_path, 16_000)


def test_save_wav_writes_nothing_wrong(tmp_path):
    path = tmp_path / "a.wav"
    for waveform in (
        np.zeros((2, 3), np.float32),
        np.zeros(0, np.float32),
        np.zeros(3, np.int16),
        np.array([0, np.inf], np.float32),
    ):
        with pytest.raises(ValueError, match="waveform"):
            save_wav(path, waveform, 8000)
    assert not path.exists()
    with pytest.raises(ValueError, match=r"a\.wav: cannot be written"):
        save_wav(tmp_path / "absent" / "a.wav", np.zeros(3, np.float32), 8000)


def test_rates_must_be_positive():
    with pytest.raises(ValueError, match=r"new_rate \(0\) must be positive"):
        resample(np.zeros(3, np.float32), 8000, 0)


# Speech


class LevelEncoder:
    """Stands for an encoder where only the order and the caching of clips are tested."""

    def __init__(self) -> None:
        self.calls = 0

    def fingerprint(self) -> str:
        return "level"

    def encode_clips(self, clips, on_batch):
        self.calls += 1
        features = torch.tensor([[[len(clip), np.abs(clip).max()]] for clip in clips])
        return features.half(), torch.ones(len(clips), dtype=torch.int64)


def variants(voices: tuple[str, ...]) -> set[str]:
    return {voice.split("+")[1] for voice in voices}


def test_voices_are_kept_apart():
    assert {split: len(voices) for split, voices in spoken.WORD_VOICES.items()} == {
        "train": 40,
        "validation": 6,
        "test": 20,
    }
    for one, other in itertools.combinations(spoken.SPLITS, 2):
        assert not variants(spoken.WORD_VOICES[one]) & variants(spoken.WORD_VOICES[other])
    for split, count in (("train", 14), ("validation", 2), ("test", 5)):
        assert len(set(spoken.QUESTION_VOICES[split])) == count
        assert set(spoken.QUESTION_VOICES[split]) <= set(spoken.WORD_VOICES[split])
    assert len(set(spoken.WORDS)) == 30


@needs_espeak
def test_speech_is_the_same_whatever_was_said_before():
    phrases = [("seven", "en-us+f2"), ("a red circle", "en-gb-x-rp+klatt3"), ("seven", "en-us+f2")]
    clips = spoken.synthesize_all(phrases)
    assert all(clip.dtype == np.float32 and np.abs(clip).max() > 0.05 for clip in clips)
    assert 0.2 < len(clips[0]) / spoken.SAMPLE_RATE < 1
    assert np.array_equal(clips[0], clips[2])
    for phrase, clip in zip(reversed(phrases), reversed(clips), strict=True):
        assert np.array_equal(spoken.synthesize(*phrase), clip)
    assert spoken.synthesize_all([]) == []


@needs_espeak
def test_every_voice_exists():
    voices = [voice for split in spoken.SPLITS for voice in spoken.WORD_VOICES[split]]
    clips = spoken.synthesize_all([("seven", voice) for voice in voices])
    assert len({clip.tobytes() for clip in clips}) == len(voices) == 66


@needs_espeak
@pytest.mark.parametrize(
    ("text", "voice", "message"),
    [
        ("seven", "en-us+nobody", "voice .*nobody.* must be one that eSpeak NG has"),
        ("seven", "english", "voice .*english.* must be one that eSpeak NG has"),
        (" ", "en-us", r"text \(' '\) must hold something to say"),
    ],
)
def test_espeak_says_what_it_cannot_say(text, voice, message):
    with pytest.raises(ValueError, match=message):
        spoken.synthesize(text, voice)


@needs_espeak
def test_spoken_sets_are_labelled_and_cached(tmp_path):
    cache, encoder = FeatureCache(tmp_path), LevelEncoder()
    texts = ["what color is it?", "what shape is it?"]
    made = spoken.questions(cache, encoder, texts, "validation")
    voices = spoken.QUESTION_VOICES["validation"]
    expected = [{"text": text, "voice": voice} for voice in voices for text in texts]
    assert made.labels == expected
    for label, feature in zip(made.labels, made.features, strict=True):
        clip = spoken.synthesize(label["text"], label["voice"])
        found = torch.tensor([[len(clip), np.abs(clip).max()]]).half()
        assert torch.equal(feature, found)
    again = spoken.questions(cache, encoder, texts, "validation")
    assert encoder.calls == 1
    assert torch.equal(again.features, made.features)
    spoken.questions(cache, encoder, texts[:1], "validation")
    assert encoder.calls == 2


@needs_espeak
def test_every_word_is_spoken_in_every_voice(tmp_path):
    made = spoken.words(FeatureCache(tmp_path), LevelEncoder(), "validation")
    pairs = {(label["word"], label["voice"]) for label in made.labels}
    assert len(pairs) == len(made) == 180


def test_spoken_sets_refuse_bad_requests(tmp_path):
    cache = FeatureCache(tmp_path)
    with pytest.raises(ValueError, match=r"split \('dev'\) must be one of train, validation, test"):
        spoken.words(cache, LevelEncoder(), "dev")
    with pytest.raises(ValueError, match="texts must hold at least one question"):
        spoken.questions(cache, LevelEncoder(), [], "test")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    cache, requirements = FeatureCache(tmp_path), r".*requirements/demo-assets\.txt"
    with pytest.raises(MissingAssetError, match="espeakng_loader" + requirements):
        spoken.synthesize("seven", "en-us")
    with pytest.raises(MissingAssetError, match="espeakng_loader" + requirements):
        spoken.words(cache, LevelEncoder(), "test")
    with pytest.raises(MissingAssetError, match="pretty_midi" + requirements):
        general_midi.render(0, 60, 80)
    assert not list(tmp_path.iterdir())


# Sounds


class PeakEncoder(torch.nn.Module):
    def fingerprint(self) -> str:
        return "peak"

    def forward(self, waveforms):
        return torch.stack([waveforms.abs().amax(dim=1), waveforms.std(dim=1)], dim=1)[:, None]


def test_general_midi_tables():
    assert len(general_midi.INSTRUMENTS) == len(set(general_midi.INSTRUMENTS)) == 128
    assert len(general_midi.FAMILIES) == 16
    assert general_midi.INSTRUMENTS[0] == "acoustic grand piano"
    assert general_midi.INSTRUMENTS[73] == "flute"
    assert general_midi.INSTRUMENTS[127] == "gunshot"
    assert general_midi.family_of(73) == "pipe"
    assert general_midi.family_of(127) == "sound effects"
    for program, name in enumerate(general_midi.INSTRUMENTS):
        assert name in general_midi.FAMILIES[general_midi.family_of(program)].split(", ")


def test_pitches_and_velocities_are_held_out():
    notes = general_midi.PITCHES_AND_VELOCITIES
    for one, other in itertools.combinations(notes, 2):
        assert not set(notes[one][0]) & set(notes[other][0])
        assert not set(notes[one][1]) & set(notes[other][1])
    assert len(notes["test"][0]) * len(notes["test"][1]) * 128 == 768


@needs_sampler
def test_a_note_is_the_same_whatever_was_played_before():
    notes = [(0, 60, 100), (19, 48, 60), (127, 60, 80), (48, 66, 90)]
    sampler = general_midi.Sampler()
    first = [sampler.render(*note) for note in notes]
    second = [sampler.render(*note) for note in reversed(notes)]
    for note, one, other in zip(notes, first, reversed(second), strict=True):
        assert one.dtype == np.float32
        assert one.shape == (general_midi.CLIP_SAMPLES,)
        assert np.abs(one).max() > 0.01
        assert np.array_equal(one, other)
        assert np.array_equal(one, general_midi.render(*note))


@needs_sampler
def test_notes_have_their_pitch():
    for key, frequency in ((57, 220.0), (69, 440.0)):
        waveform = general_midi.render(73, key, 90)
        harmonic = loudest_frequency(waveform, 44_100) / frequency
        assert round(harmonic) in (1, 2, 3)
        assert abs(harmonic - round(harmonic)) < 0.02


@needs_sampler
def test_every_instrument_sounds_at_every_pitch_of_the_test_split():
    sampler = general_midi.Sampler()
    pitches, velocities = general_midi.PITCHES_AND_VELOCITIES["test"]
    for program, pitch in itertools.product(range(128), pitches):
        waveform = sampler.render(program, pitch, velocities[0])
        assert np.abs(waveform).max() > 5e-3, (program, pitch)


@needs_sampler
@pytest.mark.parametrize(
    ("note", "message"),
    [
        ((128, 60, 80), r"program \(128\) must be between 0 and 127"),
        ((0, -1, 80), r"pitch \(-1\) must be between 0 and 127"),
        ((0, 60, 0), r"velocity \(0\) must be between 1 and 127"),
    ],
)
def test_notes_are_checked(note, message):
    with pytest.raises(ValueError, match=message):
        general_midi.render(*note)


@needs_sampler
def test_sounds_are_labelled(tmp_path, monkeypatch):
    monkeypatch.setitem(general_midi.PITCHES_AND_VELOCITIES, "validation", ((50,), (90,)))
    made = general_midi.load(FeatureCache(tmp_path), PeakEncoder(), "validation")
    assert len(made) == 128
    assert made.lengths.tolist() == [1] * 128
    assert made.labels[73] == {"instrument": "flute", "family": "pipe", "pitch": "50"}
    flute = PeakEncoder()(torch.from_numpy(general_midi.render(73, 50, 90))[None])
    assert torch.equal(made.features[73], flute[0].half())
    assert json.dumps(made.labels)
    with pytest.raises(ValueError, match=r"split \('dev'\) must be one of train, validation, test"):
        general_midi.load(FeatureCache(tmp_path), PeakEncoder(), "dev")
