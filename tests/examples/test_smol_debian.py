"""Packages of Debian, from an apt-get and a dpkg-deb that are fakes."""

from pathlib import Path

import pytest

from examples.smol import debian


class Reporter:
    def __init__(self):
        self.said, self.steps = [], 0

    def start(self, stage, total, done):
        self.total, self.done = total, done

    def advance(self, steps, **figures):
        self.steps += steps

    def finish(self):
        pass

    def say(self, text):
        self.said.append(text)


APT = """#!/bin/sh
echo "$3" >> "$(dirname "$0")/asked"
case "$3" in
  gone*) echo "E: Unable to locate package gone" >&2; exit 100;;
  old=*) echo "E: Version was not found" >&2; exit 100;;
esac
touch "${3%%=*}_1_all.deb"
"""
DPKG = """#!/bin/sh
mkdir -p "$3/usr"
echo "$2" > "$3/usr/file"
"""


@pytest.fixture
def tools(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("apt-get", APT), ("dpkg-deb", DPKG)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    versions = {"good": "1.0", "old": "2.0", "gone": "3.0"}
    monkeypatch.setattr(debian, "wanted_versions", lambda: versions)
    return folder


def test_packages_are_unpacked_once_and_missing_ones_left_out(tools, tmp_path):
    reporter, folder = Reporter(), tmp_path / "debian"
    found = debian.unpack_packages(folder, reporter)
    assert found == {"good": folder / "good", "old": folder / "old"}
    assert (folder / "old/usr/file").read_text() == "old_1_all.deb\n"
    assert reporter.said == ["left out: package gone of Debian (E: Unable to locate package gone)"]
    assert reporter.steps == 3
    asked = (tools / "asked").read_text().split()
    assert asked == ["good=1.0", "old=2.0", "old", "gone=3.0", "gone"]
    assert sorted(path.name for path in folder.iterdir()) == ["good", "old"]

    (tools / "asked").unlink()
    assert debian.unpack_packages(folder, Reporter()) == found
    assert (tools / "asked").read_text().split() == ["gone=3.0", "gone"]


def test_only_the_listed_folder_of_a_large_package_is_kept(tools, tmp_path, monkeypatch):
    (tools / "dpkg-deb").write_text(
        DPKG + 'mkdir -p "$3/usr/a/b" && echo "$2" > "$3/usr/a/b/font"\n'
    )
    parts = {"good": Path("usr/a/b"), "old": Path("usr/c")}
    monkeypatch.setattr(debian, "_PARTS", parts)
    reporter, folder = Reporter(), tmp_path / "debian"
    assert debian.unpack_packages(folder, reporter) == {"good": folder / "good"}
    files = [path for path in (folder / "good").rglob("*") if path.is_file()]
    assert files == [folder / "good/usr/a/b/font"]
    assert reporter.said[0] == "left out: package old of Debian (it has no folder usr/c)"
    assert [path.name for path in folder.iterdir()] == ["good"]


def test_without_apt_all_packages_are_left_out(tools, tmp_path, monkeypatch):
    monkeypatch.setattr(debian.shutil, "which", lambda name: None)
    reporter = Reporter()
    assert debian.unpack_packages(tmp_path / "debian", reporter) == {}
    assert reporter.said == ["apt-get and dpkg-deb are not here; left out: good, old, gone"]
    assert not (tmp_path / "debian").exists()


def test_versions_are_those_of_the_requirements():
    versions = debian.wanted_versions()
    assert versions["tuxpaint-stamps-default"] == "2022.06.04-1"
    assert all(versions.values())
