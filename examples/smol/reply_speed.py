"""Time to the first word of a reply, and words per second after it."""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

from unimoe_model.chat import Conversation
from unimoe_model.encoders.outside import permit_encoder
from unimoe_model.generation import Answerer
from unimoe_model.training.recipe import Recipe

QUESTION = "Write a few sentences about what the picture shows."
ASKED = 5
"""Number of pictures that are asked about, after one that is not counted."""

Ask = Callable[[Path], Iterator[str]]


def reply_speed(ask: Ask, pictures: Sequence[Path]) -> dict[str, float]:
    """Measures replies to a question about each picture.

    Args:
        ask: asks about a picture, and returns the pieces of the reply as they are generated.
        pictures: pictures; the first one loads encoders and is not counted.

    Returns:
        `"first_word"`: median seconds to the first piece of a reply, with reading and encoding of
        the picture. `"words_per_second"`: words after the first pieces, by the time that they took,
        over all replies; left out if no reply has more than one piece.

    Raises:
        ValueError: If there are fewer than two pictures.
    """
    if len(pictures) < 2:
        raise ValueError(f"pictures ({len(pictures)}) must be at least 2")
    firsts, words, seconds = [], 0, 0.0
    for number, picture in enumerate(pictures):
        started = time.perf_counter()
        pieces = []
        for piece in ask(picture):
            if not pieces:
                first = time.perf_counter()
            pieces.append(piece)
        ended = time.perf_counter()
        if number and pieces:
            firsts.append(first - started)
            words += len("".join(pieces[1:]).split())
            seconds += ended - first
    found = {"first_word": median(firsts)} if firsts else {}
    return found | ({"words_per_second": words / seconds} if words else {})


def fresh_reply_speed(model: Path, recipe: Recipe, pictures: Sequence[Path]) -> dict[str, float]:
    """Measures replies of a model in a new process, as `unimoe chat` runs it.

    Memory of a process that has trained is fragmented.

    Args:
        model: folder of the model.
        recipe: recipe, whose encoders the model uses.
        pictures: as of `reply_speed`.

    Returns:
        See `reply_speed`.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        names, folder = recipe.encoder_names, Path(recipe.path).parent
        return process.submit(_measured, model, names, folder, list(pictures)).result()


def _measured(
    model: Path, encoders: Sequence[str], folder: Path, pictures: Sequence[Path]
) -> dict[str, float]:
    for name in encoders:
        permit_encoder(name, folder)
    answerer = Answerer.from_pretrained(model)

    def ask(picture: Path) -> Iterator[str]:
        conversation = Conversation(answerer.model, answerer.processor, max_new_tokens=48)
        return conversation.reply(QUESTION, images=[str(picture)])

    return reply_speed(ask, pictures)


def reply_line(speed: dict[str, float]) -> str:
    """Formats the speed as a line."""
    parts = []
    if "first_word" in speed:
        parts.append(f"first word after {speed['first_word']:.2f} s")
    if "words_per_second" in speed:
        parts.append(f"then {speed['words_per_second']:.1f} words per second")
    return f"Replies to a question about a picture: {', '.join(parts) or 'none has words'}"
