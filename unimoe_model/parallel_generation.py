"""Generation by several ranks that share the experts of a model."""

from collections.abc import Mapping

import torch

from unimoe_kernels.distributed import attributed
from unimoe_model.modeling import UniMoEForConditionalGeneration


@torch.inference_mode()
def generate_in_parallel(
    model: UniMoEForConditionalGeneration,
    inputs: Mapping[str, torch.Tensor] | None,
    **options,
) -> torch.Tensor | None:
    """Generates for this rank's prompts, while other ranks do so for theirs.

    Every rank calls it as often as the others, with prompts of any number and length, or with None.
    A rank that is done, by an end token or its own `max_new_tokens`, goes on to answer rows of
    other ranks until all are done.

    Args:
        model: after `parallelize_moe`, in eval mode.
        inputs: what `generate` takes, `input_ids` `[B, S]` among them; None for no prompts.
        **options: options of `generate`; they may differ between ranks.

    Returns:
        What `generate` returns, or None without prompts.

    Raises:
        ValueError: if the cache is switched off: transformers keeps a rank that is done in step by
            its cache.
        CollectiveError: if a rank dies or does not come in time.
    """
    if options.get("use_cache", model.generation_config.use_cache) is False:
        raise ValueError("use_cache (False) must be True when ranks generate together")
    with attributed("generation"):
        if inputs is not None:
            return model.generate(**inputs, **options, synced_gpus=True)
        # One token that nobody asked about: its rank must be in every dispatch.
        token = model.config.text_config.bos_token_id or 0
        ids = torch.full((1, 1), token, device=model.device)
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=0,
            synced_gpus=True,
        )
        return None
