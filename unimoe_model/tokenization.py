"""Tokenization of conversations with media: token ids and labels."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from unimoe_model.chat_template import chat_text
from unimoe_model.prompt import PLACEHOLDERS, conversation_text

IGNORED = -100
_PLACEHOLDER = re.compile("|".join(PLACEHOLDERS.values()))


@dataclass
class TokenizedText:
    """Token ids and labels of a text, with one id for each placeholder.

    Attributes:
        ids: token ids, starting with the beginning-of-sequence token if the tokenizer has one.
        labels: token ids at positions with loss, -100 elsewhere.
    """

    ids: list[int]
    labels: list[int]

    def items(self, media_token_ids: Mapping[str, int]) -> list[str]:
        """Media kinds of the placeholders, in order."""
        kinds = {token: kind for kind, token in media_token_ids.items()}
        return [kinds[token] for token in self.ids if token in kinds]

    def expanded(
        self, media_token_ids: Mapping[str, int], soft_tokens: Sequence[int]
    ) -> "TokenizedText":
        """Repeats every placeholder for the soft tokens of its item, without labels.

        Args:
            media_token_ids: id of each kind's placeholder.
            soft_tokens: number of soft tokens of each item, in the order of the placeholders.

        Raises:
            ValueError: If the numbers of items and placeholders differ.
        """
        held = len(self.items(media_token_ids))
        if held != len(soft_tokens):
            raise ValueError(f"soft_tokens ({len(soft_tokens)} items) must be of {held} items")
        remaining, placeholders = iter(soft_tokens), set(media_token_ids.values())
        ids, labels = [], []
        for token, label in zip(self.ids, self.labels, strict=True):
            count = next(remaining) if token in placeholders else 1
            ids += [token] * count
            labels += [label] * count
        return TokenizedText(ids, labels)


def truncated(
    text: TokenizedText, media_token_ids: Mapping[str, int], soft_tokens: Sequence[int], most: int
) -> tuple[TokenizedText, int]:
    """Truncates a text to at most `most` tokens, counted with expanded placeholders.

    An item that does not fit as a whole is removed with its placeholder and everything after it.

    Args:
        text: text before expansion.
        media_token_ids: id of each kind's placeholder.
        soft_tokens: number of soft tokens of each item, in the order of the placeholders.
        most: maximum number of tokens, at least 1.

    Returns:
        The truncated text, not expanded, and the number of items that remain.

    Raises:
        ValueError: If `most` is less than 1, or the numbers of items and placeholders differ.
    """
    if most < 1:
        raise ValueError(f"most ({most}) must be at least 1")
    placeholders = set(media_token_ids.values())
    if len(text.items(media_token_ids)) != len(soft_tokens):
        raise ValueError(f"soft_tokens ({len(soft_tokens)} items) must be one an item")
    length, kept, items = 0, 0, 0
    for token in text.ids:
        length += soft_tokens[items] if token in placeholders else 1
        if length > most:
            break
        kept += 1
        items += token in placeholders
    return TokenizedText(text.ids[:kept], text.labels[:kept]), items


def tokenize_conversation(
    turns: Sequence[tuple[str, str | None]],
    tokenizer: PreTrainedTokenizerBase,
    media_token_ids: Mapping[str, int],
    system: str = "",
) -> TokenizedText:
    """Tokenizes a conversation in the published format, with labels on its answers.

    Labels cover everything after `ASSISTANT:` up to and including the end-of-turn token, which is
    what a model generates, but never placeholders. Unlike here, the published code discards samples
    whose answers end in a space or contain ` ASSISTANT: `, or whose questions contain an
    end-of-turn token.

    Args:
        turns: pairs of the user's message, with a placeholder for each media item, and the answer.
        tokenizer: a fast tokenizer.
        media_token_ids: id of each kind's placeholder.
        system: system prompt.
    """
    text, answers = conversation_text(turns, system, tokenizer.eos_token)
    return tokenize_text(text, tokenizer, media_token_ids, answers)


def tokenize_text(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    media_token_ids: Mapping[str, int],
    answers: Sequence[tuple[int, int]] = (),
) -> TokenizedText:
    """Tokenizes a text with placeholders; the texts between them are tokenized separately.

    Args:
        text: text with placeholders such as `<image>`.
        tokenizer: a fast tokenizer.
        media_token_ids: id of each kind's placeholder.
        answers: character ranges of the answers, `(start, end)` with `end` exclusive.
    """
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    positions = [-1] * len(ids)
    end = 0
    for match in _PLACEHOLDER.finditer(text):
        _add_chunk(text, end, match.start(), tokenizer, ids, positions)
        ids.append(media_token_ids[match[0][1:-1]])
        positions.append(-1)
        end = match.end()
    _add_chunk(text, end, len(text), tokenizer, ids, positions)
    return _labelled(ids, positions, answers)


def tokenize_chat(
    turns: Sequence[tuple[str, str | None]],
    tokenizer: PreTrainedTokenizerBase,
    system: str = "",
) -> TokenizedText:
    """Tokenizes a conversation in the tokenizer's own chat template, with labels on its answers.

    Labels cover what a model generates after the template's generation prompt, end-of-turn token
    included.

    Args:
        turns: pairs of the user's message, with a placeholder for each media item, and the answer.
        tokenizer: a fast tokenizer whose special tokens include the placeholders.
        system: system message; empty for none.

    Raises:
        ValueError: If `chat_text` rejects the conversation.
    """
    text, answers = chat_text(turns, tokenizer, system)
    return tokenize_rendered(text, tokenizer, answers)


def tokenize_rendered(
    text: str, tokenizer: PreTrainedTokenizerBase, answers: Sequence[tuple[int, int]] = ()
) -> TokenizedText:
    """Tokenizes a text that contains all special tokens; arguments as in `tokenize_text`."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [first for first, _ in encoded["offset_mapping"]]
    return _labelled(encoded["input_ids"], starts, answers)


def _labelled(
    ids: list[int], positions: list[int], answers: Sequence[tuple[int, int]]
) -> TokenizedText:
    """Adds labels to the ids whose text begins in an answer."""
    labels = [
        token if any(start <= at < stop for start, stop in answers) else IGNORED
        for token, at in zip(ids, positions, strict=True)
    ]
    return TokenizedText(ids, labels)


def _add_chunk(
    text: str,
    start: int,
    end: int,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    positions: list[int],
) -> None:
    """Appends the ids of `text[start:end]` and the start of each in the text."""
    if start == end:
        return
    chunk, kept = text[start:end], list(range(start, end))
    if _is_sentencepiece(tokenizer):
        # The published tokenizer inserts a space before every chunk and strips spaces around its
        # special tokens; the fast one does neither.
        chunk, kept = f" {chunk}", [start, *kept]
        specials = "|".join(map(re.escape, (tokenizer.bos_token, tokenizer.eos_token)))
        # A pattern that starts with spaces takes quadratic time for long runs of them.
        spaces: set[int] = set()
        for match in re.finditer(specials, chunk):
            first, last = match.span()
            while first and chunk[first - 1].isspace():
                first -= 1
                spaces.add(first)
            while last < len(chunk) and chunk[last].isspace():
                spaces.add(last)
                last += 1
        kept = [at for index, at in enumerate(kept) if index not in spaces]
        chunk = "".join(char for index, char in enumerate(chunk) if index not in spaces)
    encoded = tokenizer(chunk, add_special_tokens=False, return_offsets_mapping=True)
    ids += encoded["input_ids"]
    positions += [kept[first] for first, _ in encoded["offset_mapping"]]


def _is_sentencepiece(tokenizer: PreTrainedTokenizerBase) -> bool:
    return isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.Metaspace)


def load_llama_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a LLaMA and adds a token for each placeholder to its vocabulary.

    Args:
        folder: folder with `tokenizer.model`, or with a tokenizer saved by transformers.

    Returns:
        A fast tokenizer, with `<unk>` as padding token if it has none.

    Raises:
        ValueError: If the folder has no LLaMA tokenizer.
        ModuleNotFoundError: If `tokenizer.model` requires a package that is not installed.
    """
    from transformers import LlamaTokenizer

    folder = Path(folder)
    names = ("tokenizer.json", "tokenizer.model")
    if not any((folder / name).is_file() for name in names):
        raise ValueError(f"folder ({folder}) must hold a LLaMA tokenizer: one of {names}")
    if not (folder / names[0]).is_file():
        _require_sentencepiece()
    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    tokenizer.add_special_tokens({"extra_special_tokens": list(PLACEHOLDERS.values())})
    return tokenizer


def _require_sentencepiece() -> None:
    for module, package in (("sentencepiece", "sentencepiece"), ("google.protobuf", "protobuf")):
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"tokenizer.model needs the package {package}: pip install 'unimoe[convert]'"
            ) from error
