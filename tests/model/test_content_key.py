"""Names of media files by their content, and the memo of files that have not changed."""

import hashlib
import os

import pytest
from store_items import (
    LONG_AGO,
)

from unimoe_model.data import content_key as content_keys
from unimoe_model.data.content_key import DigestMemo, content_key


@pytest.fixture
def media(tmp_path):
    path = tmp_path / "media" / "a.png"
    path.parent.mkdir()
    path.write_bytes(b"one")
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    return path


def not_called(path):
    raise AssertionError(f"{path} was read")


def test_the_key_is_of_the_content(tmp_path, media):
    one = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    assert content_key(media) == one
    (tmp_path / "b.jpg").write_bytes(b"one")
    assert content_key(tmp_path / "b.jpg", DigestMemo(tmp_path)) == one


def test_the_key_of_a_folder_is_of_names_and_contents(tmp_path, media):
    (media.parent / "b.png").write_bytes(b"two")
    key = content_key(media.parent)
    assert content_key(media.parent, DigestMemo(tmp_path)) == key
    moved = media.parent.rename(tmp_path / "moved")
    assert content_key(moved) == key
    (moved / "b.png").write_bytes(b"TWO")
    changed = content_key(moved)
    (moved / "b.png").rename(moved / "c.png")
    renamed = content_key(moved)
    (moved / "c.png").unlink()
    assert len({key, changed, renamed, content_key(moved)}) == 4


def test_the_key_of_a_folder_is_of_its_sorted_names(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.png").write_bytes(b"%d" % number)
    lines = [
        name.encode() + b"\0" + hashlib.sha256(name.split(".")[0].encode()).hexdigest().encode()
        for name in sorted(path.name for path in tmp_path.iterdir())
    ]
    assert content_key(tmp_path) == hashlib.sha256(b"\n".join(lines)).hexdigest()


def test_a_key_needs_files(tmp_path):
    with pytest.raises(ValueError, match=r"missing.png must be a media file .* no such file"):
        content_key(tmp_path / "missing.png")
    with pytest.raises(ValueError, match=f"folder {tmp_path} must hold frames"):
        content_key(tmp_path)


def test_a_file_is_read_once(tmp_path, media, monkeypatch):
    key = content_key(media, DigestMemo(tmp_path / "memo"))
    monkeypatch.setattr(content_keys, "_digest", not_called)
    memo = DigestMemo(tmp_path / "memo")
    assert content_key(media, memo) == key
    monkeypatch.chdir(media.parent)
    assert content_key(media.relative_to(media.parent), memo) == key
    monkeypatch.undo()
    media.write_bytes(b"two")
    os.utime(media, ns=(LONG_AGO, LONG_AGO + 1))
    changed = content_key(media, memo)
    assert changed == content_key(media) != key
    assert content_key(media, DigestMemo(tmp_path / "memo")) == changed


def test_a_file_that_may_be_changing_is_read_again(tmp_path, media):
    memo = DigestMemo(tmp_path / "memo")
    media.write_bytes(b"two")
    now = media.stat().st_mtime_ns
    first = content_key(media, memo)
    media.write_bytes(b"TWO")
    os.utime(media, ns=(now, now))
    assert content_key(media, memo) == content_key(media) != first


def test_a_torn_line_of_the_memo_costs_one_file(tmp_path, media, monkeypatch):
    paths = [media, media.with_name("b.png"), media.with_name("c.png")]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]))
        os.utime(path, ns=(LONG_AGO, LONG_AGO))
    keys = [content_key(path, DigestMemo(tmp_path)) for path in paths[:2]]
    lines = tmp_path / "digests.jsonl"
    os.truncate(lines, lines.stat().st_size - 1)
    keys.append(content_key(paths[2], DigestMemo(tmp_path)))
    memo = DigestMemo(tmp_path)
    assert content_key(paths[1], memo) == keys[1]
    monkeypatch.setattr(content_keys, "_digest", not_called)
    assert [content_key(path, memo) for path in paths] == keys
    assert [content_key(path, DigestMemo(tmp_path)) for path in paths] == keys
