"""The published prompt: user turns, media placeholders first in each, and answers."""

from collections.abc import Sequence

from unimoe_model.configuration import MEDIA_KINDS

PLACEHOLDERS = {kind: f"<{kind}>" for kind in MEDIA_KINDS}
PROMPT_FORMATS = ("vicuna", "chat")
"""How conversations are written: as the published prompt, or in the tokenizer's chat template."""
USER = "USER:"
ASSISTANT = "ASSISTANT:"
END_OF_TURN = "</s>"
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""What the published checkpoints were trained to read before the first turn (`vicuna_v1`)."""


def build_prompt(question: str, media: Sequence[str] = (), system: str = "") -> str:
    r"""Writes one user turn that ends where the answer begins.

    Example:
        `build_prompt("what shape is this?", ["image"])` gives
        `"USER: <image>\nwhat shape is this? ASSISTANT:"`.

    Args:
        question: text of the question; may be empty when the question is spoken.
        media: kinds of the media that belong to it, in prompt order. A question that holds
            placeholders itself takes no media here.
        system: what stands before the turn, such as `VICUNA_SYSTEM`.

    Raises:
        ValueError: For an unknown kind, or if there is neither a question nor media.
    """
    return conversation_text([(user_turn(question, media), None)], system)[0]


def user_turn(question: str, media: Sequence[str] = ()) -> str:
    """A question behind the placeholders of its media, a line each; arguments as in `build_prompt`.

    Raises:
        ValueError: For an unknown kind, or if there is neither a question nor media.
    """
    unknown = [kind for kind in media if kind not in PLACEHOLDERS]
    if unknown:
        raise ValueError(f"media ({unknown}) must be among {MEDIA_KINDS}")
    if not question.strip() and not media:
        raise ValueError("question is empty, and there is no media to ask about")
    lines = [PLACEHOLDERS[kind] for kind in media]
    if question.strip():
        lines.append(question.strip())
    return "\n".join(lines)


def conversation_text(
    turns: Sequence[tuple[str, str | None]], system: str = "", end_of_turn: str = END_OF_TURN
) -> tuple[str, list[tuple[int, int]]]:
    """Writes a conversation as the published `vicuna_v1` template does.

    Args:
        turns: what the user says, and the answer; None or an empty one ends the text where the
            answer would begin.
        system: what stands before the first turn.
        end_of_turn: what an answer ends with; the tokenizer's end token.

    Returns:
        The text, and where in it each answer begins and ends, its end-of-turn token included.

    Raises:
        ValueError: If there are no turns, or a turn of the user is empty.
    """
    if not turns or not all(user for user, _ in turns):
        raise ValueError(f"turns ({list(turns)}) must hold at least one, none of the user empty")
    text, answers = f"{system} " if system else "", []
    for user, answer in turns:
        text += f"{USER} {user} {ASSISTANT}"
        if answer:
            start = len(text)
            text += f" {answer}{end_of_turn}"
            answers.append((start, len(text)))
    return text, answers
