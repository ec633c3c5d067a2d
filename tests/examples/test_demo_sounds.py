"""The demo's sounds: speech of eSpeak NG, and notes of General MIDI instruments."""

import itertools

import numpy as np
import pytest

pytest.importorskip("scipy", reason="scipy is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
from demo_assets import needs

from examples.demo import general_midi, spoken
from examples.stand_ins import assets
from examples.stand_ins.assets import MissingAssetError

needs_espeak = needs("espeakng_loader")
needs_sampler = needs("pretty_midi", "tinysoundfont")

# Speech


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


def test_questions_are_asked_in_every_voice_of_a_split():
    texts = ["what color is it?", "what shape is it?"]
    voices = spoken.QUESTION_VOICES["validation"]
    expected = [(text, voice) for voice in voices for text in texts]
    assert spoken.question_phrases(texts, "validation") == expected


def test_every_word_is_spoken_in_every_voice_of_a_split():
    for split, count in (("train", 1200), ("validation", 180), ("test", 600)):
        phrases = spoken.word_phrases(split)
        assert len(phrases) == len(set(phrases)) == count


def test_phrases_refuse_bad_requests():
    unknown = r"split \('dev'\) must be one of train, validation, test"
    with pytest.raises(ValueError, match=unknown):
        spoken.word_phrases("dev")
    with pytest.raises(ValueError, match=unknown):
        spoken.question_phrases(["what?"], "dev")
    with pytest.raises(ValueError, match="texts must hold at least one question"):
        spoken.question_phrases([], "test")


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    requirements = r".*requirements/demo-assets\.txt"
    with pytest.raises(MissingAssetError, match="espeakng_loader" + requirements):
        spoken.synthesize("seven", "en-us")
    with pytest.raises(MissingAssetError, match="pretty_midi" + requirements):
        general_midi.render(0, 60, 80)


# Notes


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
        spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
        harmonic = spectrum.argmax() * 44_100 / len(waveform) / frequency
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


def test_notes_of_a_split():
    notes = general_midi.notes_of("validation")
    assert len(notes) == len(set(notes)) == 256
    assert notes[:3] == [(0, 50, 90), (0, 66, 90), (1, 50, 90)]
    with pytest.raises(ValueError, match=r"split \('dev'\) must be one of train, validation, test"):
        general_midi.notes_of("dev")
