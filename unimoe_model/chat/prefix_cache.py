"""Keys and values of a conversation, reused for prompts with a common prefix."""

from collections.abc import Iterator, Sequence

from transformers import Cache, DynamicCache

from unimoe_model.configuration import UniMoEConfig
from unimoe_model.data.encoded_media import EncodedMedia, Row

Position = int | EncodedMedia
"""Content of a position of the LLM: a token id, or the item that its soft token belongs to."""


class PrefixCache:
    """The key-value cache of a conversation, and the content of each of its positions.

    Soft tokens are identified by their item, not by the placeholder's id, which all items of a
    kind share. Two items are equal only if they are the same object.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: UniMoEConfig):
        self._config = config
        self.clear()

    def clear(self) -> None:
        """Empties the cache."""
        self._cache = DynamicCache(config=self._config.text_config)
        self._held: list[Position] = []

    def begin(self, prompt: Row) -> Cache:
        """Crops the cache to the common prefix of a prompt and what is cached, and returns it.

        The last position of the prompt is never kept, because its logits are needed. A layer whose
        sliding window is full cannot be cropped: the cache is then emptied.

        Args:
            prompt: the whole conversation; `end` must be called after generating from it.
        """
        self._prompt = list(_positions(prompt, self._config))
        kept = min(_common(self._held, self._prompt), len(self._prompt) - 1)
        surplus = len(self._held) - kept
        # After a generation that failed before `end`, `_held` is empty and so is the prefix.
        if kept == 0 or (surplus and any(map(_window_is_full, self._cache.layers))):
            self.clear()
        elif surplus:
            self._cache.crop(-surplus)
        self._held = []
        return self._cache

    def end(self, generated: Sequence[int]) -> None:
        """Records the tokens that were generated; the last one may be missing from the cache."""
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
    """Length of the common prefix of two sequences."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a is not b and (isinstance(a, EncodedMedia) or isinstance(b, EncodedMedia) or a != b):
            return index
    return min(len(first), len(second))


def _window_is_full(layer) -> bool:
    return layer.is_sliding and layer.get_seq_length() >= layer.sliding_window
