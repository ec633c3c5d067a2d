"""Generation by several ranks that share the experts of a model."""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch.distributed.device_mesh import DeviceMesh
from transformers import GenerationConfig

from unimoe_kernels.distributed import attributed, load_weights, parallelize_moe
from unimoe_model.configuration import UniMoEConfig
from unimoe_model.modeling import UniMoEForConditionalGeneration


def load_in_parallel(folder: str | Path, mesh: DeviceMesh) -> UniMoEForConditionalGeneration:
    """Loads a checkpoint folder whose experts are split over the ranks; each reads its own alone.

    Args:
        folder: as `save_pretrained` writes it.
        mesh: of `start_parallel`; every rank calls.

    Returns:
        The model in eval mode, without gradients, on the device of this rank.

    Raises:
        ValueError: If the folder cannot be read, its weights are not those of its configuration, or
            the number of experts is not a multiple of the ranks of `ep`.
        CollectiveError: If a rank dies or does not come in time.
    """
    try:
        config = UniMoEConfig.from_pretrained(folder)
    except OSError as error:
        raise ValueError(f"model ({folder}) cannot be read: {error}") from error
    # Buffers, which no checkpoint holds, are built as they are.
    with init_empty_weights(include_buffers=False):
        model = UniMoEForConditionalGeneration._from_config(config, dtype=config.dtype)
    # Only here: within, each of the tied names gets a parameter of its own.
    model.tie_weights()
    model.eval().requires_grad_(False)
    parallelize_moe(model, mesh)
    load_weights(model, folder)
    if (Path(folder) / "generation_config.json").is_file():  # as `from_pretrained` does
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(mesh.device_type)


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
        ValueError: If the cache is switched off: transformers keeps a rank that is done in step by
            its cache.
        CollectiveError: If a rank dies or does not come in time.
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
