"""Keys and values of a conversation, kept for the prompts that begin as it does."""

from collections.abc import Iterator, Sequence

from transformers import Cache, DynamicCache

from unimoe_model.configuration import UniMoEConfig
from unimoe_model.data.encoded_media import EncodedMedia, Row

Position = int | EncodedMedia
"""What stands at a position of the LLM: a token, or the item that its soft token belongs to."""


class PrefixCache:
    """The cache of a conversation, and what it holds at each position.

    A soft token is told apart by its item, not by its placeholder's id, which all items of a kind
    share. An item is the same only if it is the same object.

    Args:
        config: of the model.
    """

    def __init__(self, config: UniMoEConfig):
        self._config = config
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._cache = DynamicCache(config=self._config.text_config)
        self._held: list[Position] = []

    def begin(self, prompt: Row) -> Cache:
        """The cache of what a prompt and the cache have in common at their beginning.

        At least the last position of the prompt is left out, whose logits are needed. A layer with
        a sliding window that is full cannot go back: then nothing is kept.

        Args:
            prompt: the whole conversation; `end` is called after tokens were generated from it.
        """
        self._prompt = list(_positions(prompt, self._config))
        kept = min(_common(self._held, self._prompt), len(self._prompt) - 1)
        surplus = len(self._held) - kept
        # Nothing is kept either after a generation that failed before `end`.
        if kept == 0 or (surplus and any(map(_window_is_full, self._cache.layers))):
            self.clear()
        elif surplus:
            self._cache.crop(-surplus)
        self._held = []
        return self._cache

    def end(self, generated: Sequence[int]) -> None:
        """Takes note of the tokens that were generated; the last one need not be in the cache."""
        self._held = [*self._prompt, *generated][: self._cache.get_seq_length()]


def _positions(row: Row, config: UniMoEConfig) -> Iterator[Position]:
    placeholders = set(config.media_token_ids.values())
    soft_tokens = (
        item
        for kind, item in row.media
        for _ in range(len(item.pieces) * config.num_soft_tokens(kind))
    )
    for token in row.text.ids:
        yield next(soft_tokens) if token in placeholders else token


def _common(first: Sequence[Position], second: Sequence[Position]) -> int:
    """How many positions two sequences share at their beginning."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a is not b and (isinstance(a, EncodedMedia) or isinstance(b, EncodedMedia) or a != b):
            return index
    return min(len(first), len(second))


def _window_is_full(layer) -> bool:
    return layer.is_sliding and layer.get_seq_length() >= layer.sliding_window
