"""The published prompt format."""

from collections.abc import Sequence

from unimoe_model.configuration import MEDIA_KINDS

PLACEHOLDERS = {kind: f"<{kind}>" for kind in MEDIA_KINDS}
PROMPT_FORMATS = ("vicuna", "chat")
"""Formats of conversations: the published prompt, and the tokenizer's own chat template."""
USER = "USER:"
ASSISTANT = "ASSISTANT:"
END_OF_TURN = "</s>"
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""System prompt of the published checkpoints (`vicuna_v1`)."""


def build_prompt(question: str, media: Sequence[str] = (), system: str = "") -> str:
    r"""Builds the prompt of one question, up to where the answer begins.

    Example:
        `build_prompt("what shape is this?", ["image"])` returns
        `"USER: <image>\nwhat shape is this? ASSISTANT:"`.

    Args:
        question: text of the question; may be empty if the question is spoken.
        media: kinds of its media, in prompt order; leave empty for a question with placeholders.
        system: system prompt, such as `VICUNA_SYSTEM`.

    Raises:
        ValueError: For an unknown kind, or if there is neither a question nor media.
    """
    return conversation_text([(user_turn(question, media), None)], system)[0]


def user_turn(question: str, media: Sequence[str] = ()) -> str:
    """The placeholders of a question's media, one per line, and the question; see `build_prompt`.

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
    """Renders a conversation in the published `vicuna_v1` format.

    Args:
        turns: pairs of the user's message and the answer. If the last answer is None or empty, the
            text ends where it would begin.
        system: system prompt.
        end_of_turn: text after each answer: the tokenizer's end-of-sequence token.

    Returns:
        The text, and the start and end of each answer in it, end-of-turn token included.

    Raises:
        ValueError: If there are no turns, or a message of the user is empty.
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
