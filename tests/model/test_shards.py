"""Tar shards: samples and media are read in place, and invalid samples are refused by name."""

import gzip
import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from talks import talk

pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
import soundfile
from PIL import Image

from unimoe_model.data.content_key import DigestMemo, content_key
from unimoe_model.data.conversations import read_conversations
from unimoe_model.data.media_items import as_picture, as_recording, as_video
from unimoe_model.data.shards import read_shards

ASKED = {"question": "what?", "answer": "x"}


def picture(color="red", form="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(file, form)
    return file.getvalue()


def sound(pitch=300.0):
    file = io.BytesIO()
    soundfile.write(file, np.sin(pitch * np.arange(800) / 16000), 16000, format="WAV")
    return file.getvalue()


@pytest.fixture
def shard(tmp_path):
    """Writes a tar of members by name: bytes, or what JSON is made of."""

    def write(members, name="a.tar", mode="w", form=tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / name, mode, format=form) as tar:
            for member, content in members:
                info = tarfile.TarInfo(member)
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return tmp_path / name

    return write


@pytest.fixture
def two(shard):
    first = [
        ("./0001.json", talk("what color?", "red", id=7)),
        ("./0001.png", picture("red")),
        ("./0002.jpg", picture("blue", "JPEG")),
        ("./0002.json", {**ASKED, "audio": "0002.wav"}),
        ("./0002.wav", sound()),
    ]
    second = [("deep/é" + "x" * 150 + ".json", talk("hi", "hello"))]
    return [shard(first), shard(second, "b.tar")]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_samples_and_their_media(two, shard, tmp_path, form):
    name = "deep/é" + "x" * 150
    shard([(f"{name}.json", talk("hi", "hello"))], "b.tar", form=form)
    samples = read_shards(two)
    assert len(samples) == 3
    assert samples.parts == (2, 1)
    assert samples.kinds == {"image": 2, "audio": 1}
    one, other, last = samples
    assert (one.id, one.turns) == (7, (("<image>\nwhat color?", "red"),))
    assert (other.id, other.turns) == ("0002", (("<image>\n<audio>\nwhat?", "x"),))
    assert (last.id, last.where) == (name, f"{tmp_path / 'b.tar'} sample {name}")
    assert [(kind, str(media)) for kind, media in other.media] == [
        ("image", f"{two[0]}:0002.jpg"),
        ("audio", f"{two[0]}:0002.wav"),
    ]
    assert one.media[0][1].open().read() == picture("red")
    assert samples[-1] == last
    with pytest.raises(IndexError):
        samples[3]


def test_the_json_names_members_in_any_order_and_folder(shard):
    members = [
        ("x/1.json", talk("<image> or <image>?", "r", image=["1.b.png", "x/1.a.png"])),
        ("x/1.a.png", picture("red")),
        ("x/1.b.png", picture("blue")),
    ]
    [found] = read_shards([shard(members)])
    assert [media.name for _, media in found.media] == ["x/1.b.png", "x/1.a.png"]


def test_readers_take_members(shard, tmp_path):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "v.gif", save_all=True, append_images=frames[1:])
    content = {"png": picture(), "gif": (tmp_path / "v.gif").read_bytes(), "wav": sound()}
    for name, data in content.items():
        (tmp_path / f"1.{name}").write_bytes(data)
    fields = {**ASKED, "video": "1.gif", "speech": "1.wav"}
    path = shard([("1.json", fields), *((f"1.{name}", data) for name, data in content.items())])
    [found] = read_shards([path])
    media = dict(found.media)
    assert as_picture(media["image"], "x").equal(as_picture(tmp_path / "1.png", "x"))
    assert as_video(media["video"], 2, "x").equal(as_video(tmp_path / "1.gif", 2, "x"))
    expected = as_recording(tmp_path / "1.wav", 16000, "x")
    assert (as_recording(media["speech"], 16000, "x") == expected).all()
    assert expected.any()


def test_a_member_and_a_file_of_its_bytes_have_one_key(two, tmp_path, monkeypatch):
    member = read_shards(two)[0].media[0][1]
    (tmp_path / "p.png").write_bytes(picture("red"))
    key = content_key(tmp_path / "p.png")
    memo = DigestMemo(tmp_path / "memo")
    assert content_key(member) == content_key(member, memo) == key
    assert content_key(read_shards(two)[1].media[0][1], memo) != key
    old = two[0].stat().st_mtime_ns - 10**10
    os.utime(two[0], ns=(old, old))
    member = read_shards(two)[0].media[0][1]
    assert content_key(member, memo) == key
    monkeypatch.setattr("unimoe_model.data.content_key._digest", lambda path: "read again")
    assert content_key(member, DigestMemo(tmp_path / "memo")) == key


def test_digest_changes_with_what_is_learned(two, shard):
    digests = [read_shards(two).digest, read_shards(two[::-1]).digest, read_shards(two[:1]).digest]
    shard([("1.json", talk("hi", "hullo"))], "b.tar")
    digests.append(read_shards(two).digest)
    shard([("2.json", talk("hi", "hullo"))], "b.tar")
    digests.append(read_shards(two).digest)
    assert len(set(digests)) == 5
    assert read_shards(two).digest == digests[-1]


def test_a_shard_that_changes_while_it_is_read_is_refused(two, shard):
    samples = read_shards(two)
    shard([("1.json", talk("hi", "hullo"))], "b.tar")
    with pytest.raises(ValueError, match=r"b\.tar\) has changed since it was read"):
        samples[2]


@pytest.mark.parametrize(
    ("members", "error"),
    [
        ([("1.png", picture())], "sample 1: must have one member 1.json, has 0 among ['1.png']"),
        (
            [("1.json", ASKED), ("2.json", ASKED), ("1.png", picture())],
            "sample 1: must have one member 1.json, has 0 among ['1.png']; members of a sample",
        ),
        ([("1.json", ASKED), ("1.wav", b"")], "sample 1: member 1.wav must be named by image, vi"),
        ([("1.json", ASKED), ("1.txt", b"")], "sample 1: member 1.txt must be named by image, vi"),
        (
            [("1.json", {**ASKED, "image": "2.png"}), ("1.png", b"")],
            "sample 1: media ('2.png') must be a member of the sample: ['1.png']",
        ),
        (
            [("1.json", {**ASKED, "image": "1.a.png"}), ("1.a.png", b""), ("1.b.png", b"")],
            "sample 1: image ('1.a.png') must name member 1.b.png too",
        ),
        (
            [("1.json", ASKED), ("1.png", b""), ("1.png", b"")],
            "sample 1: members ['1.json', '1.png', '1.png'] must have names of their own",
        ),
        ([("1.json", {**ASKED, "image": 3}), ("1.png", b"")], "sample 1: image (3) must name mem"),
        ([("1.json", {**ASKED, "image": 3})], "sample 1: image (3) must be a path or a list of"),
        ([("1.json", {"question": "what?"})], "sample 1: answer or answers is missing"),
        ([("1.json", b"{")], "sample 1: must be a JSON object"),
        ([("1.json", b'"\xff"')], "sample 1: 'utf-8' codec can't decode"),
        ([("1.json", talk("q"))], "sample 1: conversations turn 1 value ('q') must be followed"),
    ],
)
def test_wrong_samples(shard, members, error):
    path = shard([("0.json", ASKED), *members])
    with pytest.raises(ValueError, match="sample 1") as caught:
        read_shards([path])
    assert str(caught.value).startswith(f"{path} {error}")


def test_tars_that_are_refused(shard, tmp_path):
    def refused(match, content=None):
        path = tmp_path / "a.tar"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=match) as caught:
            read_shards([path])
        assert str(path) in str(caught.value)

    whole = shard([("1.json", ASKED), ("2.json", ASKED), ("2.png", bytes(3000))]).read_bytes()
    refused("must be an uncompressed tar; it is gzip", gzip.compress(whole))
    refused("must be a whole, uncompressed tar", b"no tar" * 200)
    refused("must be a whole, uncompressed tar: unexpected end of data", whole[:4000])
    refused("must end with a block of zeros; it is cut off", whole[:2048])
    refused("or another tar was appended, at byte 5632", whole + whole)
    refused("is damaged, or another tar", whole[:1024] + b"x" * 512 + whole[1536:])
    refused("must hold at least one sample", bytes(10240))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("1.json")
        link.type, link.linkname = tarfile.SYMTYPE, "2.json"
        tar.addfile(link)
    refused("member 1.json must be a plain file")


def test_folders_are_passed_over(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "1.json").write_text(json.dumps(ASKED))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "d", "d")
    assert [sample.id for sample in read_shards([tmp_path / "a.tar"])] == ["d/1"]


def test_a_sample_is_learned_as_a_line(shard, write_talks):
    fields = talk("hi <image>", "x", "why?", "so", id=3, image="a.png")
    line = write_talks(json.dumps(fields), "data.jsonl")
    [expected] = read_conversations(line)
    [found] = read_shards([shard([("a.json", fields), ("a.png", b"x")])])
    assert (found.id, found.turns) == (expected.id, expected.turns)
    assert [kind for kind, _ in found.media] == [kind for kind, _ in expected.media]


def test_features_of_a_member_are_those_of_the_file(
    two, tiny_config, tokenizer, encoders, tmp_path
):
    from unimoe_model.processing import UniMoEProcessor

    processor = UniMoEProcessor.from_config(tiny_config(), tokenizer)
    (tmp_path / "p.png").write_bytes(picture("red"))
    member = read_shards(two)[0].media[0][1]
    expected = processor.encode("image", tmp_path / "p.png").pieces
    for piece, found in zip(expected, processor.encode("image", member).pieces, strict=True):
        assert torch.equal(piece, found)
