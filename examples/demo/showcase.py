"""Four worked examples: media files, and the saved model's answers to questions about them."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.demo.example import Example
from unimoe_model.data.audio_io import load_wav
from unimoe_model.data.media_io import load_video
from unimoe_model.evaluation.samples import media_arguments
from unimoe_model.extras import needed_by
from unimoe_model.generation import Answerer

with needed_by("showing examples"):
    import soundfile
    from PIL import Image

_SHOWN = {
    "image_qa": ("A picture", {"image": "picture.png"}),
    "spoken_question": (
        "A spoken question about a picture",
        {"image": "picture_asked_about.png", "speech": "spoken_question.wav"},
    ),
    "sound": ("A sound", {"audio": "sound.wav"}),
    "video": ("A video", {"video": "video.gif"}),
}
_RATES = {"speech": 16_000, "audio": 44_100}
_FRAME_MS = 120


@dataclass(frozen=True)
class WorkedExample:
    """A held-out item for the report.

    Attributes:
        title: title of the example.
        files: its media files, relative to the report.
        question: text of the question, even if it is spoken.
        expected: the reference answer.
        answer: the model's answer.
    """

    title: str
    files: tuple[str, ...]
    question: str
    expected: str
    answer: str


def show_examples(
    checkpoint: Path, folder: Path, held_out: Mapping[str, Sequence[Example]]
) -> list[WorkedExample]:
    """Writes the first held-out item of four tasks to files, and answers it with the saved model.

    Args:
        checkpoint: folder of model and processor.
        folder: folder for the media files.
        held_out: held-out examples by task.

    Returns:
        A picture, a spoken question about a picture, a sound and a video.
    """
    folder.mkdir(parents=True, exist_ok=True)
    answerer = Answerer.from_pretrained(checkpoint)
    shown = []
    for task, (title, names) in _SHOWN.items():
        example = held_out[task][0]
        media = {kind: [_write(kind, path, folder / names[kind])] for kind, path in example.media}
        answer = answerer.answer(example.question, **media_arguments(media))
        files = tuple(f"{folder.name}/{paths[0].name}" for paths in media.values())
        question = example.question or example.blind_key
        shown.append(WorkedExample(title, files, question, example.answer, answer))
    return shown


def _write(kind: str, source: Path, target: Path) -> Path:
    if kind == "image":
        shutil.copyfile(source, target)
    elif kind == "video":
        first, *others = (Image.fromarray(frame.numpy()) for frame in load_video(source))
        first.save(target, save_all=True, append_images=others, duration=_FRAME_MS, loop=0)
    else:
        soundfile.write(target, load_wav(source, _RATES[kind]), _RATES[kind], "PCM_16")
    return target
