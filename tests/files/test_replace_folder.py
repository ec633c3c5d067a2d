"""A folder that is replaced is the old one or the new one, whenever a kill comes."""

import itertools
import os
import shutil

import pytest

from unimoe_kernels import recover_folder, replace_folder


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.fixture
def folder(tmp_path):
    made(tmp_path / "c", "old")
    return tmp_path / "c"


def made(folder, text):
    (folder / "parts").mkdir(parents=True)
    for name in ("a", "parts/b"):
        (folder / name).write_text(text)
    return folder


def content(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def of(text):
    return {"a": text, "parts/b": text}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def killed_at(monkeypatch, place):
    """Ends the process, as it were, before call number `place` of what changes the disk."""
    calls = itertools.count()
    for module, name in ((os, "fsync"), (os, "rename"), (shutil, "rmtree")):
        original = getattr(module, name)

        def call(*args, original=original, **options):
            if next(calls) == place:
                raise Killed
            return original(*args, **options)

        monkeypatch.setattr(module, name, call)


def test_the_folder_is_replaced_and_nothing_else_is_left(folder):
    replace_folder(folder, made(folder.with_name("c.new"), "new"))
    assert content(folder) == of("new")
    assert names(folder.parent) == ["c"]


def test_where_nothing_was_the_folder_is_new(tmp_path):
    replace_folder(str(tmp_path / "c"), str(made(tmp_path / "c.new", "new")))
    assert content(tmp_path / "c") == of("new")
    assert names(tmp_path) == ["c"]


@pytest.mark.parametrize("start", ["whole", "killed between the renames"])
def test_a_kill_at_any_moment_leaves_the_old_one_or_the_new(tmp_path, monkeypatch, start):
    found = []
    for place in range(20):
        folder = made(tmp_path / str(place) / "c", "old")
        if start != "whole":
            folder.rename(folder.with_name("c.old"))
        fresh = made(folder.with_name("c.new"), "new")
        with monkeypatch.context() as patch:
            killed_at(patch, place)
            try:
                replace_folder(folder, fresh)
            except Killed:
                killed = True
            else:
                killed = False
        recover_folder(folder)
        found.append(next(text for text in ("old", "new") if content(folder) == of(text)))
        assert "c.old" not in names(folder.parent)
        if not killed:
            break
    assert not killed
    assert found == sorted(found, reverse=True)
    assert {"old", "new"} == set(found)


def test_a_kill_during_the_recovery_is_recovered_from(tmp_path, monkeypatch):
    for place in range(2):
        old = made(tmp_path / str(place) / "c.old", "old")
        with monkeypatch.context() as patch:
            killed_at(patch, place)
            with pytest.raises(Killed):
                recover_folder(old.with_name("c"))
        recover_folder(old.with_name("c"))
        assert content(old.with_name("c")) == of("old")
        assert names(old.parent) == ["c"]


def test_recovery_of_what_was_not_killed_changes_nothing(folder):
    recover_folder(folder)
    recover_folder(folder.with_name("none"))
    assert content(folder) == of("old")
    assert names(folder.parent) == ["c"]


def test_every_file_is_on_the_disk_before_the_first_rename(folder, monkeypatch):
    done, fsync, rename = [], os.fsync, os.rename
    fresh = made(folder.with_name("c.new"), "new")

    def logged_fsync(descriptor):
        done.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def logged_rename(*names):
        done.append("rename")
        rename(*names)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    files = {(fresh / name).stat().st_ino for name in of("new")}
    replace_folder(folder, fresh)
    assert set(done[:2]) == files
    assert done[2:] == ["rename", "rename"]


def test_what_must_not_be_replaced_is_not(folder):
    """Nor is a neighbour that has the name of an old folder."""
    fresh = made(folder.with_name("fresh"), "new")
    made(folder.with_name("c.old"), "a neighbour")
    with pytest.raises(OSError, match="c"):
        replace_folder(folder, fresh, overwrite=False)
    assert content(folder) == of("old")
    assert content(fresh) == of("new")
    shutil.rmtree(folder)
    replace_folder(folder, fresh, overwrite=False)
    assert content(folder) == of("new")
    assert content(folder.with_name("c.old")) == of("a neighbour")


def test_what_is_no_folder_replaces_none_and_is_not_replaced(folder):
    with pytest.raises(NotADirectoryError, match=r"fresh \(.*none\) must be a folder"):
        replace_folder(folder, folder.with_name("none"))
    (folder.parent / "file").touch()
    for overwrite in (True, False):
        with pytest.raises(NotADirectoryError, match=r"folder \(.*file\) must be a folder"):
            replace_folder(folder.parent / "file", folder, overwrite=overwrite)
    assert content(folder) == of("old")
    assert names(folder.parent) == ["c", "file"]
