"""Plans of how each tensor of a checkpoint is built from tensors of another.

`WeightConverter` of transformers describes such plans, but `from_pretrained` and `save_pretrained`
apply them to a whole model in memory. It also casts experts of several dtypes to one, and does not
merge LoRA.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unimoe_kernels import merge_lora_weight
from unimoe_model.checkpoints.names import (
    LORA,
    PROJECTIONS,
    aside_reason,
    own_part,
    published_expert,
    published_name,
)

Read = Callable[[str], Tensor]
"""Returns the tensor of a name."""


@dataclass(frozen=True)
class Lora:
    """A low-rank update `scale * B @ A`, by the names of A and B."""

    a: str
    b: str
    scale: float


@dataclass
class Matrix:
    """One tensor, with the low-rank updates that are merged into it."""

    name: str
    loras: list[Lora] = field(default_factory=list)

    def read(self, read: Read) -> Tensor:
        """Returns a copy of the tensor with its updates merged, in at least float32.

        Raises:
            ValueError: If an update has a wrong shape.
        """
        value = read(self.name).clone(memory_format=torch.contiguous_format)
        for lora in self.loras:
            a, b = read(lora.a), read(lora.b)
            if value.shape != b.shape[:1] + a.shape[1:] or b.shape[1:] != a.shape[:1]:
                raise ValueError(
                    f"{lora.a} ({_kind(a)}) and {lora.b} ({_kind(b)}) must fit"
                    f" {self.name} ({_kind(value)})"
                )
            value = merge_lora_weight(value, a, b, lora.scale)
        return value


@dataclass
class Stack:
    """Matrices of experts stacked in one tensor: entry e concatenates the rows of expert e's."""

    experts: list[list[Matrix]]

    @property
    def name(self) -> str:
        """Name of the first matrix."""
        return self.experts[0][0].name

    def read(self, read: Read) -> Tensor:
        """Returns the stacked tensor.

        Raises:
            ValueError: If the matrices differ in shape or dtype.
        """
        stacked = None
        for number, expert in enumerate(self.experts):
            for half, matrix in enumerate(expert):
                value = matrix.read(read)
                if stacked is None:
                    stacked = value.new_empty(len(self.experts), len(expert), *value.shape)
                if value.shape != stacked.shape[2:] or value.dtype != stacked.dtype:
                    raise ValueError(
                        f"{matrix.name} ({_kind(value)}) must have the shape and dtype of"
                        f" {self.name} ({_kind(stacked[0, 0])})"
                    )
                stacked[number, half] = value
        return stacked.flatten(1, 2)


@dataclass
class Entry:
    """One matrix of a stacked expert weight."""

    name: str
    expert: int
    half: int
    halves: int

    def read(self, read: Read) -> Tensor:
        """Returns a copy of the matrix."""
        return read(self.name)[self.expert].chunk(self.halves)[self.half].clone()


Recipe = Matrix | Stack | Entry


def _kind(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)}, {tensor.dtype}"


def checked_layout(
    recipes: Mapping[str, Recipe], tensors: Mapping[str, Tensor], expected: Mapping[str, tuple]
) -> dict[str, Tensor]:
    """Evaluates recipes on the meta device and checks the shapes of the results.

    Args:
        recipes: recipes by the names of the tensors that they build.
        tensors: source tensors by name, on the meta device.
        expected: shapes of the results by name.

    Returns:
        The results by name, on the meta device.

    Raises:
        ValueError: For the first tensor that is missing, unexpected, or of a wrong shape.
    """
    layout = {}
    for name, recipe in recipes.items():
        if name not in expected:
            raise ValueError(f"{recipe.name} becomes {name}, which the model does not have")
        try:
            layout[name] = recipe.read(tensors.__getitem__)
        except KeyError as error:
            raise ValueError(f"{error.args[0]} is missing") from error
        if layout[name].shape != expected[name]:
            raise ValueError(
                f"{recipe.name} gives {name} the shape {list(layout[name].shape)}, expected"
                f" {list(expected[name])}"
            )
    return layout


@dataclass
class Plan:
    """How a checkpoint is built from another.

    Attributes:
        targets: recipe of each tensor by its new name.
        aside: names of source tensors that are not parameters of the model, with the reason.
        merged: names of source tensors that LoRA is merged into.
    """

    targets: dict[str, Recipe]
    aside: dict[str, str]
    merged: list[str]


def plan_from_published(
    names: Collection[str],
    hears: str,
    lora_scale: float | None = None,
    adapter: Mapping[str, Lora] | None = None,
    num_experts: int | None = None,
) -> Plan:
    """Plans the tensors of this package from published ones.

    Args:
        names: names of all tensors of the source.
        hears: kind of sound of the checkpoint's aligner, `"speech"` or `"audio"`.
        lora_scale: scale of the LoRA inside the experts of the eight-expert code.
        adapter: further LoRA, by the published name of the weight.
        num_experts: number of experts per MoE layer; None infers it from the highest expert number.

    Raises:
        ValueError: If a name is unknown, an expert or a half of a LoRA is missing, or the weight of
            a LoRA is missing.
    """
    corrections = list((adapter or {}).items())
    in_adapter = {name for _, lora in corrections for name in (lora.a, lora.b)}
    matrices: dict[str, Matrix] = {}
    aside, halves = {}, defaultdict(dict)
    for name in names:
        if reason := aside_reason(name):
            aside[name] = reason
        elif lora := LORA.fullmatch(name):
            halves[lora[1] + lora[3]][lora[2]] = name
        elif own_part(name, hears):
            matrices[name] = Matrix(name)
        elif name not in in_adapter:
            raise ValueError(f"{name} is not a weight of a published checkpoint")
    for base, found in halves.items():
        if found.keys() != {"A", "B"} or lora_scale is None:
            raise ValueError(f"LoRA of {base} must have A and B and a scale, has {sorted(found)}")
        corrections.append((base, Lora(found["A"], found["B"], lora_scale)))
    for base, lora in corrections:
        if base not in matrices:
            raise ValueError(f"{lora.a} is LoRA of {base}, which the checkpoint lacks")
        matrices[base].loras.append(lora)
    merged = sorted({base for base, _ in corrections})
    return Plan(_stacked(matrices, hears, num_experts), aside, merged)


def _stacked(
    matrices: Mapping[str, Matrix], hears: str, num_experts: int | None
) -> dict[str, Recipe]:
    targets, stacks = {}, defaultdict(dict)
    for name, matrix in matrices.items():
        part = own_part(name, hears)
        targets[part.target] = matrix
        if part.expert is not None:
            stacks[part.target][part.expert, part.projection] = matrix
    eight = any("deepspeed_moe" in name for name in matrices)
    for target, found in stacks.items():
        count = num_experts or max(number for number, _ in found) + 1
        projections = PROJECTIONS[target.rpartition(".")[2]]
        wanted = [[(number, projection) for projection in projections] for number in range(count)]
        for part in sorted(found.keys() ^ {part for expert in wanted for part in expert}):
            extra = f"not an expert below num_experts ({count})"
            problem = extra if part in found else "missing from the checkpoint"
            raise ValueError(f"{published_expert(target, *part, eight)} is {problem}")
        targets[target] = Stack([[found[part] for part in expert] for expert in wanted])
    return targets


def plan_to_published(tensors: Mapping[str, Tensor], hears: str, eight: bool) -> dict[str, Recipe]:
    """Plans published tensors from those of this package.

    Args:
        tensors: tensors to convert by name, on any device.
        hears: kind of sound of the published aligner, `"speech"` or `"audio"`; the connector for
            the other kind has no published name.
        eight: whether to use the names of the eight-expert code for experts and routers.

    Returns:
        The recipe of each tensor by its published name.

    Raises:
        ValueError: If a tensor has no published name.
    """
    targets = {}
    for own, tensor in tensors.items():
        if projections := PROJECTIONS.get(own.rpartition(".")[2]):
            for expert in range(tensor.shape[0]):
                for half, projection in enumerate(projections):
                    name = published_expert(own, expert, projection, eight)
                    targets[name] = Entry(own, expert, half, len(projections))
        elif name := published_name(own, hears, eight):
            targets[name] = Matrix(own)
        else:
            raise ValueError(f"{own} has no name in the published layout")
    return targets
