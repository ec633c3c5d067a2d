"""Objects of conversations, and the error that a file of them gives."""

import pytest

from unimoe_model.data.conversations import read_conversations


def talk(*values, **fields):
    """An object of a conversation whose turns are human and gpt in alternation."""
    turns = [
        {"from": ("human", "gpt")[number % 2], "value": value}
        for number, value in enumerate(values)
    ]
    return {**fields, "conversations": turns}


def refusal(path, *arguments):
    with pytest.raises(ValueError, match=r"\w") as caught:
        read_conversations(path, *arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message or arguments
    return message.replace(f"{path.parent}/", "")
