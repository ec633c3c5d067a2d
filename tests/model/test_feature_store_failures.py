"""A kill, a damaged file or a full disk loses at most one item and never corrupts one."""

import errno
import os
import shutil
import subprocess
import sys

import pytest
import torch
from store_items import (
    SETTINGS,
    SHAPES,
    assert_items,
    assert_same_bits,
    data_files,
    fill,
    pieces_of,
)

from unimoe_model.data.feature_store import FeatureStore, needed_bytes

# Item n is n, n + 1, ... in 4096 columns; a line is printed for every three that are flushed.
WRITER = """
import sys
import torch
from unimoe_model.data.feature_store import FeatureStore

store = FeatureStore(sys.argv[1], {"encoder": "killed"}, file_bytes=200_000)
for number in range(100_000):
    rows = number % 4 + 1
    store.write(str(number), [(torch.arange(4096) % 1000 + number % 1000).float().repeat(rows, 1)])
    if number % 3 == 2:
        store.flush()
        print(number, flush=True)
"""


def test_a_kill_at_any_byte_leaves_whole_items(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    shapes = [(2, 2), (3,)]
    data, index = "features-00000.bin", "index.jsonl"
    folder = fill(tmp_path / "whole", "ab", shapes)
    before = {name: (folder / name).stat().st_size for name in (data, index)}
    fill(tmp_path / "whole", ["last"], shapes)
    after = {name: (folder / name).stat().st_size for name in (data, index)}
    cuts = [{name: size} for name in before for size in range(before[name], after[name])]
    unflushed = range(before[data], after[data] + 1)
    cuts += [{data: size, index: before[index] + torn} for size in unflushed for torn in (0, 9)]
    assert len(cuts) > 90
    for cut in cuts:
        root = tmp_path / "cut"
        shutil.copytree(tmp_path / "whole", root)
        for name, size in cut.items():
            os.truncate(root / folder.name / name, size)
        assert_items(FeatureStore(root, SETTINGS), "ab", shapes)
        fill(root, ["more"], shapes)
        assert_items(FeatureStore(root, SETTINGS), ["a", "b", "more"], shapes)
        fill(root, ["last"], shapes)
        assert_items(FeatureStore(root, SETTINGS), ["a", "b", "more", "last"], shapes)
        shutil.rmtree(root)


@pytest.mark.parametrize("rubbish", [b"\0" * 50, b"\xff\n", b"{}\n", b"[1]\n", b'{"key": "c"}\n'])
def test_a_damaged_line_costs_one_item(tmp_path, rubbish):
    index = fill(tmp_path, "abc") / "index.jsonl"
    first, _, last = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(first + rubbish.rstrip(b"\n") + b"\n" + last)
    assert_items(FeatureStore(tmp_path, SETTINGS), "ac")
    fill(tmp_path, "bd")
    assert_items(FeatureStore(tmp_path, SETTINGS), "abcd")


def test_lines_may_be_in_any_order(tmp_path):
    index = fill(tmp_path, "abc") / "index.jsonl"
    index.write_bytes(b"".join(reversed(index.read_bytes().splitlines(keepends=True))))
    fill(tmp_path, "d")
    assert_items(FeatureStore(tmp_path, SETTINGS), "abcd")


def test_another_process_writes_and_is_killed(tmp_path):
    settings = {"encoder": "killed"}
    reader = FeatureStore(tmp_path, settings)
    command = [sys.executable, "-c", WRITER, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            flushed = int(process.stdout.readline())
            reader.refresh()
            assert len(reader) > flushed
            with pytest.raises(ValueError, match=rf"store .*killed.* process {process.pid} on"):
                reader.write("mine", pieces_of("mine"))
            while flushed < 60:
                flushed = int(process.stdout.readline())
        finally:
            process.kill()
    with FeatureStore(tmp_path, settings) as store:
        store.write("mine", pieces_of("mine"))
    for opened in (store, FeatureStore(tmp_path, settings)):
        assert len(opened) > flushed + 1
        assert_same_bits(opened.read("mine"), pieces_of("mine"), opened.dtype)
        for number in range(len(opened) - 1):
            expected = (torch.arange(4096) % 1000 + number % 1000).float()
            assert_same_bits(
                opened.read(str(number)), [expected.repeat(number % 4 + 1, 1)], opened.dtype
            )
    assert len(data_files(store.folder)) > 2


def test_a_damaged_byte_is_found(tmp_path):
    folder = fill(tmp_path, "abc")
    path = folder / "features-00000.bin"
    whole = path.read_bytes()
    size = len(whole) // 3
    for position in (size, size + 1, 2 * size - 1):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        store = FeatureStore(tmp_path, SETTINGS)
        assert_same_bits(store.read("a"), pieces_of("a"), store.dtype)
        assert_same_bits(store.read("c"), pieces_of("c"), store.dtype)
        with pytest.raises(ValueError, match=rf"{path} is damaged in item b; delete {folder}"):
            store.read("b")


@pytest.mark.parametrize(("old", "new"), [("[2, 3]", "[3, 2]"), ('"a"', '"b"'), ('t": 0', 't": 2')])
def test_a_damaged_entry_is_found(tmp_path, old, new):
    index = fill(tmp_path, ["a", "z"], [(2, 3)]) / "index.jsonl"
    first, last = index.read_text().splitlines(keepends=True)
    assert old in first
    index.write_text(first.replace(old, new) + last)
    with pytest.raises(ValueError, match="is damaged in item"):
        FeatureStore(tmp_path, SETTINGS).read("b" if "b" in new else "a")


@pytest.mark.parametrize("left", [0, 5])
def test_a_data_file_that_shrinks_later_is_found(tmp_path, left):
    folder = fill(tmp_path, "a")
    store = FeatureStore(tmp_path, SETTINGS)
    os.truncate(folder / "features-00000.bin", left)
    with pytest.raises(ValueError, match="is damaged in item a"):
        store.read("a")


def fail_midway(monkeypatch, folder, name, code):
    """Lets half of the next write into a file through, and then fails."""
    pwrite = os.pwrite
    done = []

    def failing(descriptor, content, offset):
        if os.readlink(f"/proc/self/fd/{descriptor}") != str(folder / name):
            return pwrite(descriptor, content, offset)
        if done:
            raise OSError(code, os.strerror(code))
        done.append(pwrite(descriptor, content[: len(content) // 2], offset))
        return done[0]

    monkeypatch.setattr(os, "pwrite", failing)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, at: pwrite(file, content[:7], at))
    fill(tmp_path, "abc")
    assert_items(FeatureStore(tmp_path, SETTINGS), "abc")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_costs_the_item(tmp_path, monkeypatch, code):
    size = needed_bytes(SHAPES, torch.float16)
    with FeatureStore(tmp_path, SETTINGS) as store:
        store.write("a", pieces_of("a"))
        store.flush()
        store.write("b", pieces_of("b"))
        with monkeypatch.context() as patch:
            fail_midway(patch, store.folder, "features-00000.bin", code)
            message = rf"{store.folder} is full: item c needs {size} bytes and \d+ are free"
            with pytest.raises(OSError, match=message) as error:
                store.write("c", pieces_of("c"))
        assert error.value.errno == errno.ENOSPC
        assert data_files(store.folder) == {"features-00000.bin": 2 * size}
        assert_items(store, "ab")
        store.write("d", pieces_of("d"))
    assert_items(FeatureStore(tmp_path, SETTINGS), "abd")


def test_a_full_disk_costs_what_was_not_flushed(tmp_path, monkeypatch):
    with FeatureStore(tmp_path, SETTINGS) as store:
        store.write("a", pieces_of("a"))
        store.flush()
        store.write("b", pieces_of("b"))
        store.write("c", pieces_of("c"))
        with monkeypatch.context() as patch:
            fail_midway(patch, store.folder, "index.jsonl", errno.ENOSPC)
            with pytest.raises(OSError, match=f"{store.folder} is full: index.jsonl needs"):
                store.flush()
        assert_items(store, "a")
        assert_items(FeatureStore(tmp_path, SETTINGS), "a")
        assert data_files(store.folder) == {
            "features-00000.bin": needed_bytes(SHAPES, torch.float16)
        }
        assert len((store.folder / "index.jsonl").read_text().splitlines()) == 1
        store.write("c", pieces_of("c"))
    assert_items(FeatureStore(tmp_path, SETTINGS), "ac")


def test_what_a_failed_fsync_leaves_is_not_believed(tmp_path, monkeypatch):
    def failing(_):
        raise OSError(errno.EIO, "input/output error")

    with FeatureStore(tmp_path, SETTINGS) as store:
        store.write("a", pieces_of("a"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            with pytest.raises(OSError, match="input/output error"):
                store.flush()
        assert_items(store, "")
        store.write("b", pieces_of("b"))
    assert_items(FeatureStore(tmp_path, SETTINGS), "b")


def test_bytes_reach_the_disk_before_their_lines(tmp_path, monkeypatch):
    done, fsync, pwrite = [], os.fsync, os.pwrite

    def name_of(file):
        number = file if isinstance(file, int) else file.fileno()
        return os.path.basename(os.readlink(f"/proc/self/fd/{number}")).split("-")[0]

    def logged_fsync(file):
        done.append(("fsync", name_of(file)))
        fsync(file)

    def logged_pwrite(file, content, offset):
        done.append(("write", name_of(file)))
        return pwrite(file, content, offset)

    size = needed_bytes(SHAPES, torch.float16)
    with FeatureStore(tmp_path, SETTINGS, file_bytes=3 * size) as store:
        store.write("a", pieces_of("a"))
        monkeypatch.setattr(os, "fsync", logged_fsync)
        monkeypatch.setattr(os, "pwrite", logged_pwrite)
        for key in "bcd":
            store.write(key, pieces_of(key))
    data, index = "features", "index.jsonl"
    flush = [("fsync", data), ("write", index), ("fsync", index)]
    assert done == [("write", data), ("write", data), *flush, ("write", data), *flush]
