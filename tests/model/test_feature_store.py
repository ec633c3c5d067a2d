"""A feature store returns what was written bit for bit, to any number of readers."""

import json
import os
import pickle
import shutil

import pytest
import torch
from store_items import (
    LONG_AGO,
    SETTINGS,
    SHAPES,
    assert_items,
    assert_same_bits,
    data_files,
    fill,
    pieces_of,
)

from unimoe_model.data.content_key import DigestMemo
from unimoe_model.data.feature_store import FeatureStore, needed_bytes
from unimoe_model.folder_lock import FolderInUseError


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


def test_a_key_is_written_once(tmp_path):
    folder = fill(tmp_path, "a")
    with FeatureStore(tmp_path, SETTINGS) as store:
        for key in "aba":
            store.write(key, pieces_of(key))
        store.write("b", pieces_of("another"))
        assert_items(store, "ab")
    assert data_files(folder) == {"features-00000.bin": 2 * needed_bytes(SHAPES, torch.float16)}
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


def test_one_process_writes_at_a_time(tmp_path):
    first, second = (FeatureStore(tmp_path, SETTINGS) for _ in range(2))
    first.write("a", pieces_of("a"))
    with pytest.raises(ValueError, match=rf"store \({first.folder}\) .* process {os.getpid()} on"):
        second.write("b", pieces_of("b"))
    first.close()
    second.write("a", pieces_of("of the first"))
    second.write("b", pieces_of("b"))
    assert_items(second, "ab")
    with pytest.raises(ValueError, match="in use by"):
        first.write("c", pieces_of("c"))
    second.close()
    first.write("c", pieces_of("c"))
    first.close()
    assert_items(first, "abc")


def test_a_second_writer_waits_for_the_first(tmp_path):
    first, second = FeatureStore(tmp_path, SETTINGS), FeatureStore(tmp_path, SETTINGS)
    second.wait()  # no writer
    first.open()
    with pytest.raises(FolderInUseError, match="is in use by process"):
        second.open()
    first.write("a", pieces_of("a"))
    first.close()
    second.wait()
    assert_items(second, "a")
    with second:
        second.open()
        second.write("b", pieces_of("b"))
    assert_items(FeatureStore(tmp_path, SETTINGS), "ab")


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
    (folder / ".lock").unlink()
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
        assert (f"process {os.getpid()} on" in file.read()) == writes
    assert len(FeatureStore(tmp_path, SETTINGS)) == 0
    with pytest.raises(ValueError, match="in use by"):
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
