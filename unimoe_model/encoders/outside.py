"""Encoders outside this package, named `module:Class`, which run only with permission."""

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path

import yaml

from unimoe_model.encoders.base import FrozenEncoder
from unimoe_model.evaluation.files import file_digest

SENSES = ("vision", "speech", "audio")
_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_PERMITTED: set[str] = set()
_CHOSEN: dict[str, str] = {}


def is_outside(name: str) -> bool:
    """Whether a name has the form `module:Class`."""
    return _NAME.fullmatch(name) is not None


def permit_encoder(name: str, folder: Path) -> None:
    """Permits this process to import the class of a `module:Class` encoder.

    A model folder may name such an encoder, but must not run code by itself: a recipe or the
    option `--encoders` gives the permission.

    Args:
        name: name of the encoder; names of other forms require no permission.
        folder: folder to search for the module, after installed packages, together with the
            working directory.
    """
    if not is_outside(name):
        return
    _PERMITTED.add(name)
    for place in (folder.resolve(), Path.cwd()):
        if str(place) not in sys.path:
            sys.path.append(str(place))


def choose_encoders(path: Path) -> None:
    """Selects encoders for this process, overriding those that models name.

    Args:
        path: YAML file with one or more of the keys `vision`, `speech` and `audio`, and encoder
            names as in `build_encoder`. Its folder is also searched for modules.

    Raises:
        ValueError: If the file cannot be read or has other content.
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
    """The encoder that `choose_encoders` selected for a sense, or `name` by default."""
    return _CHOSEN.get(sense, name)


def code_digest(encoder: FrozenEncoder) -> str:
    """Hash of the file with the class of an encoder outside this package, 16 hexadecimal digits."""
    return file_digest(Path(inspect.getfile(type(encoder))))


def outside_class(name: str, sense: str) -> type[FrozenEncoder]:
    """The class of a permitted `module:Class`.

    Raises:
        ValueError: If it is not permitted, cannot be imported, or is not a `FrozenEncoder`.
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
