"""Published state dicts in and out, for models that fit in memory."""

from collections.abc import Mapping

from torch import Tensor

from unimoe_model.checkpoints.plan import Shapes, plan_from_published, plan_to_published


class _Tensors:
    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors

    @property
    def shapes(self) -> Shapes:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, rows: slice | None = None, index: int | None = None) -> Tensor:
        tensor = self._tensors[name] if index is None else self._tensors[name][index]
        return tensor if rows is None else tensor[rows]


def from_published(
    published: Mapping[str, Tensor], hears: str = "speech", lora_scale: float | None = None
) -> dict[str, Tensor]:
    """State dict of `UniMoEForConditionalGeneration` from a published one.

    Args:
        published: weights by their published names; experts are separate FFNs there.
        hears: `"speech"` or `"audio"`: which of the two the checkpoint's aligner is for.
        lora_scale: of the LoRA in the experts of the eight-expert code, which is merged.

    Returns:
        The same numbers under our names, experts stacked; what has no place here is left out.

    Raises:
        ValueError: If a name is unknown, or an expert or one of its weights is missing or of
            another shape.
    """
    source = _Tensors(published)
    plan = plan_from_published(source.shapes, hears, lora_scale)
    for recipe in plan.targets.values():
        recipe.shape(source.shapes)
    return {name: recipe.read(source) for name, recipe in plan.targets.items()}


def to_published(
    state: Mapping[str, Tensor], hears: str = "speech", eight: bool = False
) -> dict[str, Tensor]:
    """What `from_published` came from, bit for bit, without what it leaves out.

    Args:
        state: weights under our names.
        hears: see there.
        eight: whether experts and routers are called as in the eight-expert code.

    Raises:
        ValueError: If a tensor has no published name.
    """
    source = _Tensors(state)
    plan = plan_to_published(source.shapes, hears, eight)
    return {name: recipe.read(source) for name, recipe in plan.targets.items()}
