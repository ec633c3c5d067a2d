"""The parts of a study: a recipe, its arms and their seeds, and the claims to test."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimoe_model.value_types import require_at_least

EXPECTATIONS = ("less", "greater")


@dataclass(frozen=True)
class Arm:
    """A variant of the recipe.

    Attributes:
        name: name in claims and files.
        stage: last stage to train; the stages that it depends on are trained first.
        title: name in tables; `name` if empty.
        changes: keys that differ from the recipe, by stage. Mappings are merged; None removes a
            key.
        evaluate: names of the recipe's evaluations to run; None for all.
        seeds: number of seeds; None for that of the study.
    """

    name: str
    stage: str
    title: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    evaluate: list[str] | None = None
    seeds: int | None = None

    def __post_init__(self):
        require_at_least(1, seeds=self.seeds)

    @property
    def label(self) -> str:
        """Name in tables."""
        return self.title or self.name


@dataclass(frozen=True)
class Measure:
    """A number computed from the runs of a seed.

    Attributes:
        kind: key of `measures.KINDS`.
        options: options of the kind.
    """

    kind: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A claim that the measure of one arm is lower or higher than that of another.

    Attributes:
        name: unique name.
        claim: the claim as a sentence.
        measure: the measure to compare.
        arms: names of two arms.
        expect: `"less"` if the first arm's measure is claimed to be lower, else `"greater"`.
        least: smallest difference that counts as an effect.
        paper: what the paper reports, for the table.
    """

    name: str
    claim: str
    measure: Measure
    arms: list[str]
    expect: str
    least: float
    paper: str = ""

    def __post_init__(self):
        if self.expect not in EXPECTATIONS:
            raise ValueError(f"expect ({self.expect!r}) must be one of {', '.join(EXPECTATIONS)}")
        if len(self.arms) != 2 or self.arms[0] == self.arms[1]:
            raise ValueError(f"arms ({self.arms}) must be two different arms")
        if not self.least >= 0:
            raise ValueError(f"least ({self.least}) must be at least 0")


@dataclass(frozen=True)
class Table:
    """A table of arms, without a test.

    Attributes:
        title: heading.
        arms: names of the arms, one per row.
        text: explanation of the table.
    """

    title: str
    arms: list[str]
    text: str = ""


@dataclass(frozen=True)
class Study:
    """A whole study; `load_study` reads one.

    Attributes:
        path: YAML file, for errors.
        title: heading of the report.
        recipe: recipe that the arms vary.
        seeds: number of seeds; arms are trained with seeds 0 to `seeds - 1`.
        arms: arms by name.
        claims: claims to test.
        tables: tables of the report.
        curves: arms whose loss is plotted.
        maps: arms whose routing is plotted.
        alpha: probability that any claim is wrongly supported.
        routed: number of questions per evaluation whose routing is recorded.
        metrics: folder of the records of runs; None for `metrics` in the output.
        page: Markdown file to write besides the report; None for none.
        introduction: Markdown at the start of the report.
        limits: Markdown of its section on limits.
    """

    path: str
    title: str
    recipe: Path
    seeds: int
    arms: dict[str, Arm]
    claims: tuple[Claim, ...]
    tables: tuple[Table, ...] = ()
    curves: tuple[str, ...] = ()
    maps: tuple[str, ...] = ()
    alpha: float = 0.05
    routed: int = 40
    metrics: Path | None = None
    page: Path | None = None
    introduction: str = ""
    limits: str = ""

    def __post_init__(self):
        require_at_least(1, seeds=self.seeds, routed=self.routed)
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha ({self.alpha}) must be between 0 and 1")

    def seeds_of(self, arm: str) -> range:
        """Seeds of an arm."""
        own = self.arms[arm].seeds
        return range(self.seeds if own is None else own)

    def runs(self) -> list[tuple[int, str]]:
        """Seed and arm of every run, ordered by seed, so that comparisons are complete early."""
        most = max(len(self.seeds_of(arm)) for arm in self.arms)
        return [
            (seed, arm) for seed in range(most) for arm in self.arms if seed in self.seeds_of(arm)
        ]
