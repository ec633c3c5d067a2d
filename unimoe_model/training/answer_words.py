"""Labels of the objective `words`: the tokens that an answer has within a text."""

from collections.abc import Collection
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from unimoe_model.tokenization import IGNORED, TokenizedText

_BEFORE = "a"


def answers_within_text(
    text: TokenizedText, tokenizer: PreTrainedTokenizerBase, stops: Collection[int]
) -> TokenizedText:
    """Replaces the tokens of each answer by those that it has after another word and a space.

    At the start of an answer, many tokenizers divide a word that is one token after a space:
    SmolLM2's splits `"banana"` into `"ban"` and `"ana"`, but not `" banana"`. The LLM knows the
    meaning of that token, which it read in running text.

    Args:
        text: a conversation, with labels on its answers.
        tokenizer: the tokenizer of the text.
        stops: ids of tokens that end an answer, which are kept.

    Returns:
        The conversation with other ids and labels of its answers.
    """
    ids, labels = [], []
    pairs = zip(text.ids, text.labels, strict=True)
    for is_answer, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        own = [token for token, _ in run]
        if is_answer:
            own = _within_text(own, tokenizer, stops)
        ids += own
        labels += own if is_answer else [IGNORED] * len(own)
    return TokenizedText(ids, labels)


def _within_text(
    answer: list[int], tokenizer: PreTrainedTokenizerBase, stops: Collection[int]
) -> list[int]:
    length = len(answer)
    while length and answer[length - 1] in stops:
        length -= 1
    said = tokenizer.decode(answer[:length], clean_up_tokenization_spaces=False).lstrip()
    before, whole = (
        tokenizer(part, add_special_tokens=False)["input_ids"]
        for part in (_BEFORE, f"{_BEFORE} {said}")
    )
    if not said or whole[: len(before)] != before:
        return answer
    return whole[len(before) :] + answer[length:]
