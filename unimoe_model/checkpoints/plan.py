"""How each tensor of a checkpoint comes out of the tensors of another one."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from unimoe_kernels import merge_lora_weight
from unimoe_model.checkpoints.names import (
    LORA,
    aside_reason,
    own_part,
    published_expert,
    published_name,
)

Shapes = Mapping[str, tuple[int, ...]]


class Source(Protocol):
    """Tensors by name, read when they are asked for."""

    def read(self, name: str, rows: slice | None = None, index: int | None = None) -> Tensor:
        """A tensor, its `index`-th entry, or these rows of that."""


@dataclass(frozen=True)
class Lora:
    """A low-rank correction `scale * B @ A`, by the names of A and B."""

    a: str
    b: str
    scale: float


@dataclass
class Matrix:
    """One tensor as it is, with the low-rank corrections that are merged into it."""

    name: str
    loras: list[Lora] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """All that is read."""
        return [self.name, *(part for lora in self.loras for part in (lora.a, lora.b))]

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Shape of the result.

        Raises:
            ValueError: If a correction does not fit.
        """
        shape = tuple(shapes[self.name])
        for lora in self.loras:
            a, b = shapes[lora.a], shapes[lora.b]
            if len(shape) != 2 or (b[0], a[1]) != shape or b[1] != a[0]:
                raise ValueError(
                    f"{lora.a} (shape {list(a)}) and {lora.b} (shape {list(b)}) must fit"
                    f" {self.name} (shape {list(shape)})"
                )
        return shape

    def read(self, source: Source) -> Tensor:
        """The tensor, corrections merged in at least float32."""
        value = source.read(self.name)
        for lora in self.loras:
            lora_A, lora_B = source.read(lora.a), source.read(lora.b)
            value = merge_lora_weight(value, lora_A, lora_B, lora.scale)
        return value


@dataclass
class Stack:
    """Experts' matrices in one tensor: entry e holds the matrices of expert e, row by row."""

    experts: list[list[Matrix]]

    @property
    def names(self) -> list[str]:
        """All that is read."""
        return [name for expert in self.experts for matrix in expert for name in matrix.names]

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Shape of the result.

        Raises:
            ValueError: If the matrices differ in shape.
        """
        first = self.experts[0][0]
        rows, columns = first.shape(shapes)
        for expert in self.experts:
            for matrix in expert:
                if matrix.shape(shapes) != (rows, columns):
                    raise ValueError(
                        f"{matrix.name} (shape {list(shapes[matrix.name])}) must have the shape of"
                        f" {first.name} {[rows, columns]}"
                    )
        return (len(self.experts), len(self.experts[0]) * rows, columns)

    def read(self, source: Source) -> Tensor:
        """The stacked tensor."""
        stacked = None
        for number, expert in enumerate(self.experts):
            for half, matrix in enumerate(expert):
                value = matrix.read(source)
                rows = value.shape[0]
                if stacked is None:
                    shape = (len(self.experts), len(expert) * rows, value.shape[1])
                    stacked = value.new_empty(shape)
                stacked[number, half * rows : (half + 1) * rows] = value
        return stacked


@dataclass
class Entry:
    """One matrix out of a stack of experts."""

    name: str
    expert: int
    half: int
    halves: int

    @property
    def names(self) -> list[str]:
        """All that is read."""
        return [self.name]

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Shape of the result."""
        _, rows, columns = shapes[self.name]
        return (rows // self.halves, columns)

    def read(self, source: Source) -> Tensor:
        """The matrix."""
        rows = source.shapes[self.name][1] // self.halves
        return source.read(self.name, slice(self.half * rows, (self.half + 1) * rows), self.expert)


Recipe = Matrix | Stack | Entry


@dataclass
class Plan:
    """What a checkpoint is made of.

    Attributes:
        targets: how each tensor is made, by its new name.
        aside: tensors of the source that have no place in it, and why.
    """

    targets: dict[str, Recipe]
    aside: dict[str, str]


def plan_from_published(
    shapes: Shapes,
    hears: str,
    lora_scale: float | None = None,
    adapter: Mapping[str, Lora] | None = None,
    num_experts: int | None = None,
) -> Plan:
    """Plans our names out of published ones.

    Args:
        shapes: of all tensors of the source.
        hears: see `own_part`.
        lora_scale: of the LoRA in the experts of the eight-expert code.
        adapter: further corrections, by the published name of what they correct.
        num_experts: how many experts each layer with experts must have; None is as many as the
            highest number says.

    Raises:
        ValueError: If a name is unknown, an expert or a half of a LoRA is missing, or a correction
            corrects nothing.
    """
    matrices: dict[str, Matrix] = {}
    aside, halves = {}, defaultdict(dict)
    for name in shapes:
        reason, lora = aside_reason(name), LORA.fullmatch(name)
        if reason:
            aside[name] = reason
        elif lora:
            halves[lora[1] + lora[3]][lora[2]] = name
        elif own_part(name, hears) is None:
            if any(name in (part.a, part.b) for part in (adapter or {}).values()):
                continue
            raise ValueError(f"{name} is no weight of a published checkpoint")
        else:
            matrices[name] = Matrix(name)
    corrections = [(base, lora) for base, lora in (adapter or {}).items()]
    for base, found in halves.items():
        if found.keys() != {"A", "B"} or lora_scale is None:
            raise ValueError(f"LoRA of {base} must have A and B and a scale, has {sorted(found)}")
        corrections.append((base, Lora(found["A"], found["B"], lora_scale)))
    for base, lora in corrections:
        if base not in matrices:
            raise ValueError(f"{lora.a} corrects {base}, which the checkpoint lacks")
        matrices[base].loras.append(lora)
    return Plan(_stacked(matrices, hears, num_experts), aside)


def _stacked(
    matrices: Mapping[str, Matrix], hears: str, num_experts: int | None
) -> dict[str, Recipe]:
    targets, stacks = {}, defaultdict(lambda: defaultdict(dict))
    for name, matrix in matrices.items():
        part = own_part(name, hears)
        if part.expert is None:
            targets[part.target] = matrix
        else:
            targets[part.target] = None
            stacks[part.target][part.expert][part.projection] = matrix
    for target, experts in stacks.items():
        wanted = ("down",) if target.endswith("down_proj") else ("gate", "up")
        count = num_experts or max(experts) + 1
        eight = any("deepspeed_moe" in name for name in matrices)
        for number in range(max(count, max(experts) + 1)):
            missing = [name for name in wanted if name not in experts[number]]
            if missing and number < count:
                name = published_expert(target, number, missing[0], eight)
                raise ValueError(f"{name} is missing from the checkpoint")
            if experts[number] and number >= count:
                name = published_expert(target, number, wanted[0], eight)
                raise ValueError(f"{name} is one too many for num_experts ({count})")
        targets[target] = Stack(
            [[experts[number][name] for name in wanted] for number in range(count)]
        )
    return targets


def plan_to_published(
    shapes: Shapes, hears: str, eight: bool, left_out: Sequence[str] = ()
) -> Plan:
    """Plans published names out of ours.

    Args:
        shapes: of all tensors of a model.
        hears: see `own_part`; the other connector has no published name beside this one.
        eight: whether experts and routers are called as in the eight-expert code.
        left_out: names that are not asked for.

    Raises:
        ValueError: If a tensor has no published name.
    """
    targets, aside = {}, {}
    for own, shape in shapes.items():
        if own in left_out:
            aside[own] = "was not in the published checkpoint"
        elif own.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            names = ("down",) if own.endswith("down_proj") else ("gate", "up")
            for expert in range(shape[0]):
                for half, projection in enumerate(names):
                    name = published_expert(own, expert, projection, eight)
                    targets[name] = Entry(own, expert, half, len(names))
        else:
            name = published_name(own, hears, eight)
            if name is None:
                raise ValueError(f"{own} has no name in the published layout")
            targets[name] = Matrix(own)
    return Plan(targets, aside)
