"""From conversations with media to ids and labels, as the published code or an LLM numbers them."""

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
    """Ids of a text with one id for each placeholder, and labels.

    Attributes:
        ids: token ids; the beginning-of-sequence token comes first where the tokenizer has one.
        labels: the ids that are to be learned, -100 elsewhere.
    """

    ids: list[int]
    labels: list[int]

    def items(self, media_token_ids: Mapping[str, int]) -> list[str]:
        """Kinds of the placeholders, in their order."""
        kinds = {token: kind for kind, token in media_token_ids.items()}
        return [kinds[token] for token in self.ids if token in kinds]

    def expanded(
        self, media_token_ids: Mapping[str, int], soft_tokens: Sequence[int]
    ) -> "TokenizedText":
        """Every placeholder repeated as often as its item has soft tokens, without a label.

        Args:
            media_token_ids: id of each kind's placeholder.
            soft_tokens: soft tokens of each item, in the order of the placeholders.

        Raises:
            ValueError: If there are not as many items as placeholders.
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
    """The beginning of a text that has at most `most` tokens once its placeholders are expanded.

    An item is kept whole or left out with its placeholder, and so is everything after it.

    Args:
        text: not expanded yet.
        media_token_ids: id of each kind's placeholder.
        soft_tokens: soft tokens of each item, in the order of the placeholders.
        most: at least 1.

    Returns:
        The text, not expanded, and how many of its items are left, from the first one.

    Raises:
        ValueError: If most is below 1, or there are not as many items as placeholders.
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
    """Ids of a conversation, and labels of its answers.

    Labelled is everything from behind `ASSISTANT:` to the end-of-turn token, which is what a model
    has to write; placeholders are never. This differs from the published code where that gives up
    a whole sample: answers that end in a space or hold ` ASSISTANT: `, and questions that hold an
    end-of-turn token.

    Args:
        turns: what the user says, with a placeholder for each item of media, and the answer.
        tokenizer: a fast tokenizer.
        media_token_ids: id of each kind's placeholder.
        system: what stands before the first turn.
    """
    text, answers = conversation_text(turns, system, tokenizer.eos_token)
    return tokenize_text(text, tokenizer, media_token_ids, answers)


def tokenize_text(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    media_token_ids: Mapping[str, int],
    answers: Sequence[tuple[int, int]] = (),
) -> TokenizedText:
    """Ids of a text: what stands between placeholders is tokenized by itself.

    Args:
        text: with placeholders such as `<image>`.
        tokenizer: a fast tokenizer.
        media_token_ids: id of each kind's placeholder.
        answers: where in the text it is to be learned, from first to behind the last character.
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
    """Ids of a conversation in the tokenizer's own chat template, and labels of its answers.

    Arguments as in `tokenize_conversation`; the placeholders are special tokens of the tokenizer.
    Labelled is what a model writes after the template's generation prompt, the end of turn
    included.

    Raises:
        ValueError: See `chat_text`.
    """
    text, answers = chat_text(turns, tokenizer, system)
    return tokenize_rendered(text, tokenizer, answers)


def tokenize_rendered(
    text: str, tokenizer: PreTrainedTokenizerBase, answers: Sequence[tuple[int, int]] = ()
) -> TokenizedText:
    """Ids of a text that holds all of its special tokens; arguments as in `tokenize_text`."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [first for first, _ in encoded["offset_mapping"]]
    return _labelled(encoded["input_ids"], starts, answers)


def _labelled(
    ids: list[int], positions: list[int], answers: Sequence[tuple[int, int]]
) -> TokenizedText:
    """Ids with labels where they begin in an answer."""
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
    """Adds the ids of `text[start:end]` and where in the text each begins."""
    if start == end:
        return
    chunk, kept = text[start:end], list(range(start, end))
    if _is_sentencepiece(tokenizer):
        # The published tokenizer puts a space before every chunk and has none around its special
        # tokens; the fast one does neither by itself.
        chunk, kept = f" {chunk}", [start, *kept]
        specials = "|".join(map(re.escape, (tokenizer.bos_token, tokenizer.eos_token)))
        spaces = [
            at
            for match in re.finditer(rf"\s*({specials})\s*", chunk)
            for at in (*range(match.start(), match.start(1)), *range(match.end(1), match.end()))
        ]
        kept = [at for index, at in enumerate(kept) if index not in spaces]
        chunk = "".join(char for index, char in enumerate(chunk) if index not in spaces)
    encoded = tokenizer(chunk, add_special_tokens=False, return_offsets_mapping=True)
    ids += encoded["input_ids"]
    positions += [kept[first] for first, _ in encoded["offset_mapping"]]


def _is_sentencepiece(tokenizer: PreTrainedTokenizerBase) -> bool:
    return isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.Metaspace)


def load_llama_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a LLaMA, with a token for each placeholder after its vocabulary.

    Args:
        folder: holds `tokenizer.model` or what transformers saves.

    Returns:
        A fast tokenizer that pads with `<unk>`, unless it has a padding token.

    Raises:
        ValueError: If the folder holds no LLaMA tokenizer.
        ModuleNotFoundError: If `tokenizer.model` cannot be read for want of a package.
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
