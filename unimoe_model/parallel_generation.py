"""Generation with the experts of a model split over ranks."""

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
    """Loads a model with its experts split over ranks; each rank reads only its own experts.

    Args:
        folder: folder written by `save_pretrained`.
        mesh: mesh of `start_parallel`; all ranks must call.

    Returns:
        The model in eval mode, without gradients, on the device of this rank.

    Raises:
        ValueError: If the folder cannot be read, its weights do not match its configuration, or the
            number of experts is not a multiple of the size of the dimension `ep`.
        CollectiveError: If a rank dies or times out.
    """
    try:
        config = UniMoEConfig.from_pretrained(folder)
    except OSError as error:
        raise ValueError(f"model ({folder}) cannot be read: {error}") from error
    # Buffers are not part of a checkpoint, so they are built for real.
    with init_empty_weights(include_buffers=False):
        model = UniMoEForConditionalGeneration._from_config(config, dtype=config.dtype)
    # Outside of the context, in which each of the tied names gets a separate parameter.
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
    """Generates for this rank's prompts, while other ranks generate for theirs.

    All ranks must call it equally often, with any number and length of prompts, or with None. A
    rank that has finished, by an end token or its own `max_new_tokens`, keeps computing its experts
    for the others until all have finished.

    Args:
        model: model after `parallelize_moe`, in eval mode.
        inputs: inputs of `generate`, including `input_ids` `[B, S]`; None for no prompts.
        **options: options of `generate`; they may differ between ranks.

    Returns:
        The output of `generate`, or None without prompts.

    Raises:
        ValueError: If `use_cache` is False: transformers requires the cache to keep a rank that has
            finished in step.
        CollectiveError: If a rank dies or times out.
    """
    if options.get("use_cache", model.generation_config.use_cache) is False:
        raise ValueError("use_cache (False) must be True when ranks generate together")
    with attributed("generation"):
        if inputs is not None:
            return model.generate(**inputs, **options, synced_gpus=True)
        # Generates a dummy token, because this rank must take part in every dispatch.
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
