"""Debian packages with data: downloaded with apt and unpacked into a folder, without root."""

import shutil
import subprocess
from pathlib import Path

from unimoe_kernels import replace_folder
from unimoe_model.training.progress import ProgressReporter

VERSIONS = Path(__file__).parents[2] / "requirements" / "smol-debian.txt"
_PARTS = {"firefox-esr": Path("usr/lib/firefox-esr/fonts")}
"""The folder that is kept of packages that are large without it."""


def wanted_versions() -> dict[str, str]:
    """Returns the version of each package listed in `requirements/smol-debian.txt`."""
    lines = VERSIONS.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return dict(pairs)


def unpack_packages(folder: Path, reporter: ProgressReporter) -> dict[str, Path]:
    """Downloads and unpacks the packages that are not in the folder yet.

    If the listed version is not available, another one is used. A package that is not available at
    all is left out and reported.

    Args:
        folder: folder in which each package gets a folder, complete or not at all.
        reporter: reports downloads and packages that are left out.

    Returns:
        The folder of each unpacked package.
    """
    wanted = wanted_versions()
    folder = Path(folder)
    missing = [name for name in wanted if not (folder / name).is_dir()]
    if missing and not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        reporter.say(f"apt-get and dpkg-deb are not here; left out: {', '.join(missing)}")
        missing = []
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        reporter.start("download packages of Debian", len(wanted), len(wanted) - len(missing))
        try:
            for name in missing:
                problem = _unpack(name, wanted[name], folder)
                if problem:
                    reporter.say(f"left out: package {name} of Debian ({problem})")
                reporter.advance(1)
        finally:
            reporter.finish()
    return {name: folder / name for name in wanted if (folder / name).is_dir()}


def _unpack(name: str, version: str, folder: Path) -> str:
    """Unpacks a package into its own folder. Returns the reason if it is not available."""
    work = folder / f".{name}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        for asked in (f"{name}={version}", name):
            result = _run(["apt-get", "download", "-qq", asked], work)
            if result.returncode == 0:
                break
        files = list(work.glob("*.deb"))
        if result.returncode != 0 or len(files) != 1:
            return _last_line(result.stderr) or "apt-get downloaded nothing"
        result = _run(["dpkg-deb", "-x", files[0].name, "content"], work)
        if result.returncode != 0:
            return _last_line(result.stderr) or "dpkg-deb failed"
        content = work / "content"
        if name in _PARTS:
            content = _only(content, _PARTS[name], work / "part")
            if content is None:
                return f"it has no folder {_PARTS[name]}"
        replace_folder(folder / name, content)
        return ""
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _only(content: Path, part: Path, target: Path) -> Path | None:
    """Moves a folder of unpacked content to the same place below a new folder."""
    if not (content / part).is_dir():
        return None
    (target / part).parent.mkdir(parents=True)
    (content / part).rename(target / part)
    return target


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
