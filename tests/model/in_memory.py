"""Published state dicts in and out, for models that fit in memory."""

from collections.abc import Mapping

from torch import Tensor

from unimoe_model.checkpoints.plan import plan_from_published, plan_to_published


def from_published(
    published: Mapping[str, Tensor], hears: str = "speech", lora_scale: float | None = None
) -> dict[str, Tensor]:
    """State dict of `UniMoEForConditionalGeneration` from a published one.

    Args:
        published: weights by their published names; experts are separate FFNs there.
        hears: `"speech"` or `"audio"`: which of the two the checkpoint's aligner is for.
        lora_scale: of the LoRA in the experts of the eight-expert code, which is merged.

    Returns:
        The same numbers under the names of this package, with experts stacked; tensors that are not
        parameters are left out.

    Raises:
        ValueError: If a name is unknown, or an expert or one of its weights is missing or of
            another shape.
    """
    plan = plan_from_published(published, hears, lora_scale)
    return {name: recipe.read(published.__getitem__) for name, recipe in plan.targets.items()}


def to_published(
    state: Mapping[str, Tensor], hears: str = "speech", eight: bool = False
) -> dict[str, Tensor]:
    """Inverse of `from_published`, bit for bit, without tensors that it leaves out.

    Args:
        state: weights under our names.
        hears: see there.
        eight: whether experts and routers are called as in the eight-expert code.

    Raises:
        ValueError: If a tensor has no published name.
    """
    targets = plan_to_published(state, hears, eight)
    return {name: recipe.read(state.__getitem__) for name, recipe in targets.items()}
