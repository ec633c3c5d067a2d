"""What an sdist and a wheel hold."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest


@pytest.fixture(scope="module")
def tracked(root):
    """Paths of the repository's files, as git knows them or as they lie there."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return {path for path in listed.stdout.splitlines() if (root / path).is_file()}


@pytest.fixture(scope="module")
def source_copy(root, tracked, build_script, tmp_path_factory):
    """A copy without build products, so that nothing is picked up by accident."""
    copy = tmp_path_factory.mktemp("source")
    for path in tracked:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / path, copy / path)
    return copy


def build(source, out, kind):
    """Calls the build backend as pip does, without pip's isolated environment."""
    code = f"from setuptools import build_meta as b; print(b.build_{kind}({str(out)!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        capture_output=True,
        text=True,
        env={**os.environ, "UNIMOE_SKIP_EXT": "1", "UNIMOE_CUDA": ""},
    )
    assert result.returncode == 0, result.stderr
    return out / result.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def sdist_files(source_copy, tmp_path_factory):
    with tarfile.open(build(source_copy, tmp_path_factory.mktemp("sdist"), "sdist")) as archive:
        names = [member.name for member in archive.getmembers() if member.isfile()]
    return {name.split("/", 1)[1] for name in names}


@pytest.fixture(scope="module")
def wheel(source_copy, tmp_path_factory):
    return build(source_copy, tmp_path_factory.mktemp("wheel"), "wheel")


def test_sdist_holds_everything_that_a_build_needs(sdist_files, tracked):
    needed = {
        path
        for path in tracked
        if path.startswith(("csrc/", "requirements/"))
        or (
            path.startswith(("unimoe_kernels/", "unimoe_model/"))
            and path.endswith((".css", ".py", ".json"))
        )
    }
    needed |= {"setup.py", "pyproject.toml", "LICENSE", "README.md", "constraints.txt"}
    assert len([path for path in needed if path.startswith("csrc/")]) >= 8
    assert not needed - sdist_files


def test_sdist_holds_no_tests_and_no_build_products(sdist_files):
    unwanted = ("tests/", "benchmarks/", "runs/", "build/", ".ci/", "docs/")
    assert not [path for path in sdist_files if path.startswith(unwanted)]
    assert not [path for path in sdist_files if path.endswith((".so", ".o", ".pyc"))]


def test_wheel_holds_the_two_packages_only(wheel, tracked):
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    assert {path.split("/")[0] for path in files if ".dist-info/" not in path} == {
        "unimoe_kernels",
        "unimoe_model",
    }
    modules = {
        path
        for path in tracked
        if path.startswith(("unimoe_kernels/", "unimoe_model/"))
        and path.endswith((".css", ".py", ".json"))
    }
    assert not modules - files
    assert {"unimoe_kernels/py.typed", "unimoe_model/py.typed"} <= files


def test_wheel_holds_nothing_of_the_demo(wheel):
    words = re.compile(r"easy_vqa|espeak|sprites|efficientnet|aisfx|examples/", re.IGNORECASE)
    with zipfile.ZipFile(wheel) as archive:
        assert not [path for path in archive.namelist() if words.search(path)]
        modules = [path for path in archive.namelist() if path.endswith(".py")]
        found = [path for path in modules if words.search(archive.read(path).decode())]
    assert len(modules) > 100
    assert not found


def test_wheel_without_extension_is_pure(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_version_is_the_package_version(wheel):
    import unimoe_kernels

    assert wheel.name.startswith(f"unimoe-{unimoe_kernels.__version__}-")


def test_wheel_has_the_command_and_the_extras(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = next(path for path in archive.namelist() if path.endswith("/METADATA"))
        metadata = archive.read(info).decode()
        commands = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
    assert "unimoe = unimoe_model.cli:main" in commands
    for extra in ("media", "eval", "serve", "trainer", "test", "dev", "docs", "peers"):
        assert f"Provides-Extra: {extra}" in metadata
    assert "Requires-Dist: torch>=2.11" in metadata
