"""Encoders outside this package, named `module:Class`: run only where the user said so."""

import re
import sys
from importlib import import_module
from pathlib import Path

import yaml

from unimoe_model.encoders.base import FrozenEncoder

SENSES = ("vision", "speech", "audio")
_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_PERMITTED: set[str] = set()
_CHOSEN: dict[str, str] = {}


def is_outside(name: str) -> bool:
    """Whether a name is that of a class outside this package."""
    return _NAME.fullmatch(name) is not None


def permit_encoder(name: str, folder: Path) -> None:
    """Lets this process import the class of a `module:Class`.

    A model folder may name such an encoder, and must not make code run by that alone: a recipe or
    the option `--encoders` permits it.

    Args:
        name: of the encoder; other names need no permission.
        folder: where the module is looked for beside the packages that are installed and the
            working directory.
    """
    if not is_outside(name):
        return
    _PERMITTED.add(name)
    for place in (folder.resolve(), Path.cwd()):
        if str(place) not in sys.path:
            sys.path.append(str(place))


def choose_encoders(path: Path) -> None:
    """Takes the encoders that a file names, for this process, whatever models name.

    Args:
        path: YAML with one or more of the keys `vision`, `speech` and `audio`; values as in
            `build_encoder`. Modules are looked for in its folder too.

    Raises:
        ValueError: If the file cannot be read or holds something else.
    """
    try:
        names = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"encoders ({path}) must be a readable YAML file: {error}") from error
    known = isinstance(names, dict) and names and names.keys() <= set(SENSES)
    if not known or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"encoders ({path}) must map {', '.join(SENSES)} to names, got {names!r}")
    for sense, name in names.items():
        permit_encoder(name, path.parent)
        _CHOSEN[sense] = name


def chosen_encoder(name: str, sense: str) -> str:
    """The encoder that `choose_encoders` took instead of this one."""
    return _CHOSEN.get(sense, name)


def outside_class(name: str, sense: str) -> type[FrozenEncoder]:
    """The class of a permitted `module:Class`.

    Raises:
        ValueError: If it is not permitted, cannot be imported, or is no `FrozenEncoder`.
    """
    if name not in _PERMITTED:
        raise ValueError(
            f"{sense} encoder ({name}) is code outside this package and is not run because a model"
            f" names it; --encoders FILE permits it, with the line {sense}: {name}"
        )
    module, cls = name.split(":")
    try:
        found = getattr(import_module(module), cls)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{sense} encoder ({name}) cannot be imported: {error}") from error
    if not isinstance(found, type) or not issubclass(found, FrozenEncoder):
        raise ValueError(f"{sense} encoder ({name}) must be a subclass of FrozenEncoder")
    return found
