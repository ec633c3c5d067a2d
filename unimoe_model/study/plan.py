"""What a study consists of: a recipe, its variants, their seeds, and the claims to be tested."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimoe_model.value_types import require_at_least

EXPECTATIONS = ("less", "greater")


@dataclass(frozen=True)
class Arm:
    """A variant of the recipe.

    Attributes:
        name: names it in claims and files.
        title: what tables call it; the name if empty.
        stage: stage that it ends with; the stages that this one starts from are trained before.
        changes: keys of stages that differ from the recipe, by the name of the stage. Mappings are
            merged; a value of None removes the key.
        evaluate: held-out questions that it is asked; None is all of the recipe.
        seeds: its own number of seeds; None is that of the study.
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
        """What tables call it."""
        return self.title or self.name


@dataclass(frozen=True)
class Measure:
    """A number that is computed from each run; `measures.KINDS` has what there is.

    Attributes:
        kind: of `measures.KINDS`.
        options: its options.
    """

    kind: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """That the first of two arms has a lower or a higher measure than the second.

    Attributes:
        name: names it in tables.
        claim: the sentence that is tested.
        paper: what the paper reports, for the table.
        measure: what is compared.
        arms: two names.
        expect: `"less"` or `"greater"`.
        least: smallest difference that counts as an effect.
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
    """Arms that are shown beside each other, without a test.

    Attributes:
        title: heading.
        arms: names, in order; differences are to the first.
        text: explains the table.
    """

    title: str
    arms: list[str]
    text: str = ""


@dataclass(frozen=True)
class Study:
    """A whole study; `load_study` reads one.

    Attributes:
        path: the file, for errors.
        title: heading of the report.
        recipe: the recipe that all arms vary.
        seeds: every arm is trained with seeds 0 to `seeds - 1`.
        arms: by name.
        claims: in order.
        tables: arms that are shown without a test.
        curves: arms whose loss is drawn.
        maps: arms whose routing is drawn.
        alpha: probability of any wrong verdict, over all claims.
        routed: held-out questions of each kind whose tokens are followed through the routers.
        metrics: folder of the small files that finished runs leave; None is in the output.
        page: Markdown file that is written besides the report; None is none.
        introduction: Markdown that the page begins with.
        limits: Markdown that the page ends with.
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
        """The seeds that an arm is trained with."""
        own = self.arms[arm].seeds
        return range(self.seeds if own is None else own)

    def runs(self) -> list[tuple[int, str]]:
        """Every seed and arm, seed by seed: comparisons of the first seeds are complete first."""
        most = max(len(self.seeds_of(arm)) for arm in self.arms)
        return [
            (seed, arm) for seed in range(most) for arm in self.arms if seed in self.seeds_of(arm)
        ]
