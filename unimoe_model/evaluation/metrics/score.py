"""What a metric gives back."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Score:
    """Result of a metric on a set of items.

    Attributes:
        value: of the whole set; a share in 0..1 where the metric is an accuracy.
        per_item: of each item, in order.
        details: counts that explain the value.
    """

    value: float
    per_item: list[float]
    details: dict[str, int] = field(default_factory=dict)

    @classmethod
    def mean(cls, per_item: list[float], **details: int) -> "Score":
        """The score whose value is the mean over the items, at least one."""
        return cls(sum(per_item) / len(per_item), per_item, details)
