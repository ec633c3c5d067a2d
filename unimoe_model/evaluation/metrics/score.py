"""The result of a metric."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Score:
    """Result of a metric on a set of items.

    Attributes:
        value: score of the whole set; between 0 and 1 for accuracies.
        per_item: score of each item, in order.
        details: counts behind the value.
    """

    value: float
    per_item: list[float]
    details: dict[str, int] = field(default_factory=dict)

    @classmethod
    def mean(cls, per_item: list[float], **details: int) -> "Score":
        """A score whose value is the mean of `per_item`, which must not be empty."""
        return cls(sum(per_item) / len(per_item), per_item, details)
