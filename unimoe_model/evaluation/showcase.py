"""Four worked examples: files anybody can open, put through the saved model from disk."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unimoe_model.data import easy_vqa, general_midi, spoken, sprites
from unimoe_model.data.audio_io import load_wav, save_wav
from unimoe_model.data.examples import Example
from unimoe_model.data.media_io import load_image, load_video, save_gif
from unimoe_model.encoders.aisfx import SAMPLE_RATE as AISFX_RATE
from unimoe_model.encoders.whisper import SAMPLE_RATE as WHISPER_RATE
from unimoe_model.generation import Answerer


@dataclass(frozen=True)
class WorkedExample:
    """A held-out item as a reader sees it.

    Attributes:
        title: what is shown.
        files: files of its media, relative to the report.
        question: what is asked, in words even where it is spoken.
        expected: the right answer.
        answer: the model's.
    """

    title: str
    files: tuple[str, ...]
    question: str
    expected: str
    answer: str


def show_examples(
    checkpoint: Path, folder: Path, held_out: Mapping[str, Sequence[Example]]
) -> list[WorkedExample]:
    """Writes the first held-out item of four tasks to files and lets the saved model answer.

    Args:
        checkpoint: folder of model and processor.
        folder: where the media files go.
        held_out: held-out examples by task.

    Returns:
        A picture, a spoken question about a picture, a sound and a video.
    """
    folder.mkdir(parents=True, exist_ok=True)
    answerer = Answerer.from_pretrained(checkpoint)
    return [
        _picture(answerer, folder, held_out["image_qa"][0]),
        _spoken_question(answerer, folder, held_out["spoken_question"][0]),
        _sound(answerer, folder, held_out["sound"][0]),
        _video(answerer, folder, held_out["video"][0]),
    ]


def _picture(answerer: Answerer, folder: Path, example: Example) -> WorkedExample:
    path = _copy_picture(folder / "picture.png", example)
    answer = answerer.answer(example.question, images=[load_image(path)])
    return _worked("A picture", folder, [path], example.question, example, answer)


def _spoken_question(answerer: Answerer, folder: Path, example: Example) -> WorkedExample:
    picture = _copy_picture(folder / "picture_asked_about.png", example)
    clip = next(ref.index for ref in example.media if ref.kind == "speech")
    text, voice = spoken.question_phrases(easy_vqa.question_texts(), "test")[clip]
    wav = folder / "spoken_question.wav"
    save_wav(wav, spoken.synthesize(text, voice), WHISPER_RATE)
    answer = answerer.answer("", images=[load_image(picture)], speech=[load_wav(wav, WHISPER_RATE)])
    return _worked(
        "A spoken question about a picture", folder, [picture, wav], text, example, answer
    )


def _sound(answerer: Answerer, folder: Path, example: Example) -> WorkedExample:
    program, pitch, velocity = general_midi.notes_of("test")[example.media[0].index]
    wav = folder / "sound.wav"
    save_wav(wav, general_midi.render(program, pitch, velocity), AISFX_RATE)
    answer = answerer.answer(example.question, audio=[load_wav(wav, AISFX_RATE)])
    return _worked("A sound", folder, [wav], example.question, example, answer)


def _video(answerer: Answerer, folder: Path, example: Example) -> WorkedExample:
    gif = folder / "video.gif"
    save_gif(gif, sprites.render("test", example.media[0].index, seed=0))
    answer = answerer.answer(example.question, videos=[load_video(gif)])
    return _worked("A video", folder, [gif], example.question, example, answer)


def _copy_picture(path: Path, example: Example) -> Path:
    index = next(ref.index for ref in example.media if ref.kind == "image")
    shutil.copyfile(easy_vqa.image_path("test", index), path)
    return path


def _worked(
    title: str,
    folder: Path,
    paths: Sequence[Path],
    question: str,
    example: Example,
    answer: str,
) -> WorkedExample:
    files = tuple(f"{folder.name}/{path.name}" for path in paths)
    return WorkedExample(title, files, question, example.answer, answer)
