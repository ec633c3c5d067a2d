"""What was written is read bit for bit or is not there, whatever was killed in between."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import zlib

import pytest
import torch

from unimoe_model.data import content_key as content_keys
from unimoe_model.data.content_key import DigestMemo, content_key
from unimoe_model.data.feature_store import FeatureStore, needed_bytes

SETTINGS = {"encoder": "openai/clip-vit", "fingerprint": "1234", "frames": 8}
SHAPES = [(3, 2, 5), (1, 4), (7,), (), (0, 5)]
LONG_AGO = 10**18

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


def pieces_of(key, shapes=SHAPES):
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def assert_same_bits(actual, pieces, dtype):
    assert len(actual) == len(pieces)
    for got, piece in zip(actual, pieces, strict=True):
        expected = piece.to(dtype)
        assert got.dtype == torch.float32
        assert got.shape == piece.shape
        assert torch.equal(got, expected.float())
        bits = [x.to(dtype).flatten().view(torch.int16) for x in (got, expected)]
        assert torch.equal(*bits)


def assert_items(store, keys, shapes=SHAPES):
    assert len(store) == len(keys)
    for key in keys:
        assert key in store
        assert_same_bits(store.read(key), pieces_of(key, shapes), store.dtype)


def fill(root, keys, shapes=SHAPES, **options):
    with FeatureStore(root, SETTINGS, **options) as store:
        for key in keys:
            store.write(key, pieces_of(key, shapes))
    return store.folder


def data_files(folder):
    return {path.name: path.stat().st_size for path in sorted(folder.glob("features-*.bin"))}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_items_are_read_bit_for_bit(tmp_path, dtype):
    limits = torch.finfo(dtype)
    pieces = {
        "ragged": pieces_of("ragged"),
        "limits": [torch.tensor([limits.max, limits.min, limits.tiny, limits.tiny / 8, -0.0, 0.0])],
        "strided": [torch.randn(6, 4).t()[::2], torch.randn(1, 3).expand(5, 3)],
        "other dtypes": [torch.randn(3).double(), torch.randn(3).half(), torch.randn(3).bfloat16()],
        "with gradient": [torch.randn(2, 2, requires_grad=True)],
        "no rows": [torch.zeros(0, 3)],
    }
    with FeatureStore(tmp_path / "made", SETTINGS, dtype) as store:
        for key, item in pieces.items():
            store.write(key, item)
            assert_same_bits(store.read(key), item, dtype)
    again = FeatureStore(tmp_path / "made", SETTINGS, dtype)
    assert len(again) == len(pieces)
    for key, item in pieces.items():
        assert_same_bits(again.read(key), item, dtype)


def test_the_first_item_may_have_no_numbers(tmp_path):
    fill(tmp_path, "a", [(0, 3), (2, 0)])
    assert_items(FeatureStore(tmp_path, SETTINGS), "a", [(0, 3), (2, 0)])


def test_what_is_read_is_a_copy(tmp_path):
    fill(tmp_path, "ab")
    store = FeatureStore(tmp_path, SETTINGS)
    for piece in store.read("a"):
        piece.fill_(7)
    assert_items(store, "ab")


def test_sizes_are_known_before(tmp_path):
    folder = fill(tmp_path, "ab")
    assert needed_bytes(SHAPES, torch.float16) == 2 * (30 + 4 + 7 + 1)
    assert data_files(folder) == {"features-00000.bin": 2 * needed_bytes(SHAPES, torch.float16)}
    assert FeatureStore(tmp_path, SETTINGS).nbytes == 2 * needed_bytes(SHAPES, torch.float16)


def test_a_key_is_written_once(tmp_path):
    folder = fill(tmp_path, "a")
    with FeatureStore(tmp_path, SETTINGS) as store:
        for key in "aba":
            store.write(key, pieces_of(key))
        store.write("b", pieces_of("another"))
        assert_items(store, "ab")
    assert data_files(folder) == {"features-00000.bin": store.nbytes}
    assert len((folder / "index.jsonl").read_text().splitlines()) == 2


def test_a_key_that_is_not_there_is_named(tmp_path):
    with pytest.raises(KeyError, match="key \\(b\\) must be one of the 0 in"):
        FeatureStore(tmp_path, SETTINGS).read("b")


def test_several_data_files(tmp_path):
    shapes = [(10,), (5, 2)]
    with FeatureStore(tmp_path, SETTINGS, file_bytes=100) as store:
        for key in "abcde":
            store.write(key, pieces_of(key, shapes))
            assert_items(store, "abcde"[: "abcde".index(key) + 1], shapes)
        store.write("large", [torch.ones(400)])
    sizes = [80, 80, 40, 800]
    assert data_files(store.folder) == {f"features-{n:05d}.bin": s for n, s in enumerate(sizes)}
    with FeatureStore(tmp_path, SETTINGS, file_bytes=1000) as again:
        assert again.read("large")[0].sum() == 400
        again.write("f", pieces_of("f", shapes))
    assert list(data_files(store.folder).values()) == [80, 80, 40, 840]
    assert "f" in FeatureStore(tmp_path, SETTINGS)


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
            with pytest.raises(ValueError, match=rf"folder .*killed.* \(pid {process.pid}\)"):
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


def test_one_process_writes_at_a_time(tmp_path):
    first, second = (FeatureStore(tmp_path, SETTINGS) for _ in range(2))
    first.write("a", pieces_of("a"))
    with pytest.raises(ValueError, match=rf"folder \({first.folder}\) .* \(pid {os.getpid()}\)"):
        second.write("b", pieces_of("b"))
    first.close()
    second.write("a", pieces_of("of the first"))
    second.write("b", pieces_of("b"))
    assert_items(second, "ab")
    with pytest.raises(ValueError, match="being written"):
        first.write("c", pieces_of("c"))
    second.close()
    first.write("c", pieces_of("c"))
    first.close()
    assert_items(first, "abc")


def test_a_reader_sees_what_was_flushed(tmp_path):
    reader = FeatureStore(tmp_path, SETTINGS)
    with FeatureStore(tmp_path, SETTINGS, file_bytes=150) as store:
        for number, key in enumerate("abc"):
            store.write(key, pieces_of(key))
            assert_items(store, "abc"[: number + 1])
            reader.refresh()
            assert_items(reader, "abc"[:number])
            store.flush()
            assert_items(reader, "abc"[:number])
            reader.refresh()
            assert_items(reader, "abc"[: number + 1])


def test_a_reader_changes_nothing(tmp_path):
    FeatureStore(tmp_path / "none", SETTINGS).close()
    assert not (tmp_path / "none").exists()
    folder = fill(tmp_path, "ab")
    with (folder / "index.jsonl").open("ab") as file:
        file.write(b'{"key": "torn')
    (folder / "lock").unlink()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with FeatureStore(tmp_path, SETTINGS) as store:
        assert_items(store, "ab")
        store.flush()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_pickled_copy_reads(tmp_path):
    with FeatureStore(tmp_path, SETTINGS, torch.bfloat16) as store:
        store.write("a", [torch.ones(10_000)])
        store.flush()
        assert store.read("a")[0].sum() == 10_000
        copy = pickle.dumps(store)
        assert len(copy) < 1000
        assert pickle.loads(copy).read("a")[0].sum() == 10_000


@pytest.mark.parametrize("writes", [True, False])
def test_a_forked_copy_neither_writes_nor_keeps_the_lock(tmp_path, writes):
    store = FeatureStore(tmp_path, SETTINGS)
    store.write("a", pieces_of("a"))
    ended, end = os.pipe()
    answer, answers = os.pipe()
    if not (child := os.fork()):
        try:
            os.close(end)
            store.flush()
            if writes:
                try:
                    store.write("b", pieces_of("b"))
                except ValueError as error:
                    os.write(answers, str(error).encode())
                store.close()
            os.close(answers)
            os.read(ended, 1)
        finally:
            os._exit(0)
    os.close(answers)
    with open(answer) as file:
        assert (f"(pid {os.getpid()})" in file.read()) == writes
    assert len(FeatureStore(tmp_path, SETTINGS)) == 0
    with pytest.raises(ValueError, match="being written"):
        fill(tmp_path, "c")
    store.write("b", pieces_of("b"))
    store.close()
    fill(tmp_path, "c")
    os.close(end)
    os.waitpid(child, 0)
    os.close(ended)
    assert_items(FeatureStore(tmp_path, SETTINGS), "abc")


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float16, 70000.0),
        (torch.float16, -65520.0),
        (torch.float16, float("nan")),
        (torch.bfloat16, 3.4e38),
        (torch.bfloat16, float("inf")),
    ],
)
def test_what_the_dtype_cannot_hold_is_refused(tmp_path, dtype, value):
    pieces = [torch.ones(2, 3), torch.ones(2, 3)]
    pieces[1][1, 2] = value
    with FeatureStore(tmp_path, SETTINGS, dtype) as store:
        with pytest.raises(ValueError, match=rf"item k1 \(.*\) must be finite in {dtype}") as error:
            store.write("k1", pieces)
        assert f"({torch.tensor(value).item()})" in str(error.value)
        assert "k1" not in store
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([], r"\(list\) must be a list of tensors, not empty"),
        (torch.ones(2, 3), r"\(Tensor\) must be a list of tensors"),
        ([torch.ones(2, dtype=torch.int64)], r"\(torch.int64\) must be floats"),
    ],
)
def test_pieces_must_be_tensors_of_floats(tmp_path, pieces, message):
    with pytest.raises(ValueError, match=rf"pieces of item k1 .*{message}"):
        FeatureStore(tmp_path, SETTINGS).write("k1", pieces)


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
        assert data_files(store.folder) == {"features-00000.bin": store.nbytes}
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


def test_other_settings_are_another_folder(tmp_path):
    folder = fill(tmp_path, "a")
    assert folder.name.startswith("openai-clip-vit-")
    assert FeatureStore(tmp_path, dict(reversed(SETTINGS.items()))).folder == folder
    others = [
        FeatureStore(tmp_path, {**SETTINGS, "fingerprint": "1235"}),
        FeatureStore(tmp_path, {**SETTINGS, "frames": "8"}),
        FeatureStore(tmp_path, {**SETTINGS, "encoder": "openai clip-vit"}),
        FeatureStore(tmp_path, SETTINGS, torch.bfloat16),
    ]
    assert len({folder, *(other.folder for other in others)}) == 5
    assert not any(len(other) for other in others)
    text = (folder / "settings.json").read_text()
    assert json.loads(text) == {"format": 1, "dtype": "float16", "settings": SETTINGS}
    assert len(text.splitlines()) > len(SETTINGS)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "unreadable"), ("[]", r"\[\]"), ('{"format": 0}', "{'format': 0")],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, content, message):
    folder = fill(tmp_path, "a")
    reader = FeatureStore(tmp_path, SETTINGS)
    (folder / "settings.json").write_text(content)
    message = rf"settings.json \({message}.*\) must be .*openai/clip-vit.*; delete {folder}"
    with pytest.raises(ValueError, match=message):
        FeatureStore(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match=message):
        reader.write("b", pieces_of("b"))
    shutil.rmtree(folder)
    reader.write("b", pieces_of("b"))
    reader.close()
    assert_items(reader, "b")


@pytest.mark.parametrize(
    ("settings", "dtype", "message"),
    [
        (SETTINGS, torch.float32, r"dtype \(torch.float32\) must be torch.float16 or"),
        ({"frames": 8}, torch.float16, "must have a text 'encoder'"),
        ({"encoder": ""}, torch.float16, "must have a text 'encoder'"),
        ({"encoder": "a", "x": torch.float16}, torch.float16, "must be JSON values"),
        ({"encoder": "a", "x": float("nan")}, torch.float16, "must be JSON values"),
    ],
)
def test_arguments_are_checked(tmp_path, settings, dtype, message):
    with pytest.raises(ValueError, match=message):
        FeatureStore(tmp_path, settings, dtype)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_umask_decides_who_may_read(tmp_path, umask):
    (tmp_path / "media").write_bytes(b"a")
    os.utime(tmp_path / "media", ns=(LONG_AGO, LONG_AGO))
    earlier = os.umask(umask)
    try:
        folder = fill(tmp_path, "ab", file_bytes=1)
        DigestMemo(folder).digest(tmp_path / "media")
    finally:
        os.umask(earlier)
    files = list(folder.iterdir())
    assert len(files) == 6
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


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
