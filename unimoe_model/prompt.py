"""The prompt: one user turn, media placeholders first, then the question."""

from collections.abc import Sequence

from unimoe_model.configuration import MEDIA_KINDS

PLACEHOLDERS = {kind: f"<{kind}>" for kind in MEDIA_KINDS}
USER = "USER:"
ASSISTANT = "ASSISTANT:"


def build_prompt(question: str, media: Sequence[str] = ()) -> str:
    r"""Writes one user turn that ends where the answer begins.

    Example:
        `build_prompt("what shape is this?", ["image"])` gives
        `"USER: <image>\nwhat shape is this? ASSISTANT:"`.

    Args:
        question: text of the question; may be empty when the question is spoken.
        media: kinds of the media that belong to it, in prompt order.

    Raises:
        ValueError: for an unknown kind, or if there is neither a question nor media.
    """
    unknown = [kind for kind in media if kind not in PLACEHOLDERS]
    if unknown:
        raise ValueError(f"media ({unknown}) must be among {MEDIA_KINDS}")
    if not question.strip() and not media:
        raise ValueError("question is empty, and there is no media to ask about")
    lines = [PLACEHOLDERS[kind] for kind in media]
    if question.strip():
        lines.append(question.strip())
    return f"{USER} " + "\n".join(lines) + f" {ASSISTANT}"
