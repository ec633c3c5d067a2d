"""What the frozen body of a connector makes of its features, computed once and kept on disk."""

import zlib
from collections.abc import Collection

import torch

from unimoe_model.data.examples import MediaBank
from unimoe_model.data.feature_cache import FeatureCache
from unimoe_model.modeling import UniMoEForConditionalGeneration

CACHED_KINDS = ("speech",)
"""Kinds whose connector body is trained in stage 1 alone."""


@torch.inference_mode()
def query_state_bank(
    model: UniMoEForConditionalGeneration,
    bank: MediaBank,
    cache: FeatureCache,
    run: str,
    sources: Collection[str] | None = None,
    batch_size: int = 128,
) -> MediaBank:
    """Runs the speech connector's frozen body once over the speech sets of a bank.

    After stage 1 only its projector is trained, so that what comes before stays the same. The
    model is put in eval mode: the states are used in every later step, and must hold no dropout.

    Args:
        model: stage 1 is done.
        bank: features of the encoders.
        cache: keeps the states.
        run: fingerprint of stage 1.
        sources: sets of the bank that are needed; None for all.
        batch_size: items a forward pass.

    Returns:
        A bank with query states `[items, queries, hidden]` in float16 for `CACHED_KINDS`, and the
        features of everything else.
    """
    model.eval()
    result = MediaBank()
    for source, features in bank.sets.items():
        kind = bank.kinds[source]
        if sources is not None and source not in sources:
            continue
        if kind in CACHED_KINDS:
            connector = model.model.connector(kind)

            def build(features=features, connector=connector):
                parts = [
                    connector.hidden_states(part.to(model.device, model.dtype)).half().cpu()
                    for part in features.split(batch_size)
                ]
                return {"states": torch.cat(parts)}

            crc = zlib.crc32(features.contiguous().view(torch.uint8).numpy())
            name = f"query_states-{source.replace('/', '-')}"
            states = cache.load_or_build(name, f"{run} {tuple(features.shape)} {crc}", build)
            features = states["states"].clone()
        result.add(source, kind, features)
    return result
