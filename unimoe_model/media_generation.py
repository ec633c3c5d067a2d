"""Support for media in the `generate` method of transformers."""

import inspect

import torch
from transformers import GenerationMixin, LlamaModel

from unimoe_model.configuration import MEDIA_KINDS

MEDIA_SUFFIXES = ("_features", "_features_mask", "_query_states")
# Name of the key-value cache in transformers: "past_key_values" before 5.24.
CACHE = (
    "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
)


class MediaGenerationMixin(GenerationMixin):
    """Repeats media for beams, and passes them to the step that has their placeholders."""

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """Generates tokens like `GenerationMixin.generate`.

        `cache` and `past_key_values` are synonyms in every version of transformers.

        Raises:
            ValueError: If media are given together with `prefill_chunk_size`, or both `cache` and
                `past_key_values`.
        """
        cache, older = kwargs.pop("cache", None), kwargs.pop("past_key_values", None)
        if cache is not None and older is not None:
            raise ValueError("give cache or past_key_values, not both")
        if cache is not None or older is not None:
            kwargs[CACHE] = older if cache is None else cache
        settings = generation_config or self.generation_config
        chunk = kwargs.get("prefill_chunk_size", settings.prefill_chunk_size)
        given = sorted(_media(kwargs))
        if chunk is not None and given:
            raise ValueError(
                f"prefill_chunk_size ({chunk}) must be None with media ({', '.join(given)}): an"
                " item cannot be split between chunks"
            )
        return super().generate(inputs, generation_config, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, input_ids=None, **kwargs):
        """Repeats each row for its beams, together with its media, of which it may have several."""
        media = {name: kwargs.pop(name) for name in list(kwargs) if name.endswith(MEDIA_SUFFIXES)}
        expanded, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **kwargs
        )
        for name, items in media.items():
            if items is not None and expand_size > 1:
                items_B = self._count_items(input_ids, _kind(name))
                if sum(items_B) != len(items):
                    raise ValueError(
                        f"input_ids hold placeholders of {sum(items_B)} {_kind(name)} items, but"
                        f" {name} holds {len(items)}"
                    )
                rows = [
                    row.repeat(expand_size, *[1] * (items.dim() - 1))
                    for row in items.split(items_B)
                ]
                items = torch.cat(rows)
            kwargs[name] = items
        return expanded, kwargs

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        inputs_embeds=None,
        is_first_iteration=False,
        **kwargs,
    ):
        """Passes media with tokens that are not in the cache, and none in later steps."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        media, cache = _media(inputs), kwargs.get(CACHE)
        if not media or cache is None:
            return inputs
        continues = next_sequence_length is not None and next_sequence_length < input_ids.shape[1]
        if not is_first_iteration and continues:
            return _without_media(inputs)
        if cache.get_seq_length() == 0:
            return inputs
        if not is_first_iteration:
            return _without_media(inputs)
        return inputs | self._media_of_new_tokens(media, input_ids, inputs["input_ids"])

    def _media_of_new_tokens(self, media, input_ids, new_ids):
        """Items of the part of a prompt that is not in the cache.

        `media` are either the items of that part or those of the whole prompt.
        """
        if new_ids is None:
            return {}
        found = {}
        for name, items in media.items():
            old_B = self._count_items(input_ids[:, : -new_ids.shape[1]], _kind(name))
            new_B = self._count_items(new_ids, _kind(name))
            if len(items) == sum(old_B) + sum(new_B):
                sizes = [size for pair in zip(old_B, new_B, strict=True) for size in pair]
                items = torch.cat(items.split(sizes)[1::2])
            found[name] = items if len(items) else None
        return found

    def _count_items(self, input_ids, kind):
        held_B = (input_ids == self.config.media_token_ids[kind]).sum(1)
        return (held_B // self.config.num_soft_tokens(kind)).tolist()


def _kind(name: str) -> str:
    return next(kind for kind in MEDIA_KINDS if name.startswith(kind))


def _media(inputs: dict) -> dict:
    return {
        name: value
        for name, value in inputs.items()
        if name.endswith(MEDIA_SUFFIXES) and value is not None
    }


def _without_media(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if not name.endswith(MEDIA_SUFFIXES)}
