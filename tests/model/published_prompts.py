"""Conversations and placeholders of the published code, and its tokenization of them."""

import json

from published import Case

PUBLISHED_IDS = {"image": -200, "speech": -999, "audio": -300, "video": -400}
"""Placeholders of media in the published code."""


def prompts_of(case: Case):
    """Tokenization by the published code, by the tokenizer's `legacy` setting."""
    return json.loads((case.folder / "prompts.json").read_text(encoding="utf-8"))


def turns_of(conversation):
    """Pairs of question and answer; the published code drops an answer that comes first."""
    values = [turn["value"] for turn in conversation]
    if conversation[0]["from"] == "gpt":
        values = values[1:]
    return list(zip(values[::2], values[1::2], strict=True))


def spoken(answers):
    """Labelled text of answers, without the white space that the tokenizer moves."""
    return "".join(answer.strip() + "</s>" for answer in answers if answer).replace(" ", "")
