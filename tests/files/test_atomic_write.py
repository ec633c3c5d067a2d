"""A file that is written with `atomic_write` is the old one or the new one, never half of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unimoe_kernels import _files, atomic_write

# Loads the module alone: torch would take seconds.
IN_ANOTHER_PROCESS = """
import os, runpy, signal, sys
module, path, killed = sys.argv[1:]
with runpy.run_path(module)["atomic_write"](path) as partial:
    partial.write_text("theirs")
    if killed == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def write_in_another_process(path, killed="not killed"):
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, _files.__file__, path, killed]
    return subprocess.run(command, check=False).returncode


@pytest.fixture
def path(tmp_path):
    (tmp_path / "a.json").write_text("old")
    return tmp_path / "a.json"


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_the_file_is_replaced_and_nothing_else_is_left(path):
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(path.parent) == ["a.json"]


def test_texts_are_paths_too(path):
    with atomic_write(str(path)) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"


def stop_in_the_middle(path, error):
    with atomic_write(path) as partial:
        partial.write_text("ne")
        raise error


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_the_old_file(path, error):
    with pytest.raises(error):
        stop_in_the_middle(path, error)
    assert path.read_text() == "old"
    assert names(path.parent) == ["a.json"]


def test_an_error_in_the_block_leaves_no_file_where_none_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stop_in_the_middle(tmp_path / "a", KeyboardInterrupt)
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_the_old_file(path, monkeypatch, call):
    def failing(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OSError, match="no space left"), atomic_write(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "old"
    assert names(path.parent) == ["a.json"]


def test_a_kill_leaves_the_old_file(path):
    assert write_in_another_process(path, "killed") == -9
    assert path.read_text() == "old"


def test_what_was_written_is_on_the_disk_before_the_rename(path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def logged_fsync(descriptor):
        done.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def logged_replace(*names):
        done.append(("replace", path.stat().st_size))
        replace(*names)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    with atomic_write(path) as partial:
        partial.write_text("longer than before")
    assert done == [("fsync", len("longer than before")), ("replace", len("old"))]


@pytest.mark.parametrize("name", ["plot.png", "model.tar.gz", "LICENSE", ".hidden"])
def test_the_other_name_is_hidden_and_has_the_suffix(tmp_path, name):
    with atomic_write(tmp_path / name) as partial:
        assert partial.suffix == Path(name).suffix or not Path(name).suffix
        assert partial.parent == tmp_path
        assert partial.name.startswith(".")
    assert names(tmp_path) == [name]


def test_writers_that_choose_a_format_by_the_suffix(tmp_path):
    pictures = pytest.importorskip("PIL.Image")
    with atomic_write(tmp_path / "a.png") as partial:
        pictures.new("RGB", (2, 2)).save(partial)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_umask_decides_the_mode(path, umask):
    path.chmod(0o600)
    earlier = os.umask(umask)
    try:
        with atomic_write(path) as partial:
            partial.unlink()
            partial.touch(0o600)
    finally:
        os.umask(earlier)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_writers_of_one_file_do_not_disturb_each_other(path):
    """Here in other processes and in the same one; the last one counts."""
    with atomic_write(path) as partial:
        partial.write_text("ours")
        assert write_in_another_process(path) == 0
        assert path.read_text() == "theirs"
        with atomic_write(path) as another:
            another.write_text("of the same process")
        assert path.read_text() == "of the same process"
    assert path.read_text() == "ours"
    assert names(path.parent) == ["a.json"]


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    folder = tmp_path / "none"
    with (
        pytest.raises(
            FileNotFoundError, match=rf"a.json\) must be in an existing folder: {folder}$"
        ),
        atomic_write(folder / "a.json"),
    ):
        pytest.fail("the block must not run")
    assert names(tmp_path) == []


def test_a_folder_is_no_file(tmp_path):
    with (
        pytest.raises(IsADirectoryError, match=r"path \(.*\) must be a file, but is a folder"),
        atomic_write(tmp_path),
    ):
        pytest.fail("the block must not run")
