"""Comparison with the last committed run of the same machine class, by ratios within each run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .history import Row

NOISY = 0.07
"""Noise of our ratio above which a row is not conclusive."""
DRIFT = 0.10
"""Difference of ratios of unchanged code from one hour to the next, regardless of noise."""


def is_noisy(row: Row, limit: float = NOISY) -> bool:
    """Whether our ratio is too noisy."""
    return row["providers"]["ours"]["noise"] > limit


def is_slower(row: Row, baseline: Row | None) -> bool:
    """Whether our ratio rose by more than the noise of both runs explains."""
    if baseline is None:
        return False
    ours, before = row["providers"]["ours"], baseline["providers"]["ours"]
    return ours["ratio"] > before["ratio"] * (1 + tolerance(ours["noise"], before["noise"]))


def tolerance(noise: float, noise_before: float) -> float:
    """Relative change of a ratio that is not a regression: `DRIFT`, or the noise of both runs.

    Each noise is capped at `NOISY`, so that a slowdown of 15 % always exceeds the limit.
    """
    return max(DRIFT, min(noise, NOISY) + min(noise_before, NOISY))


@dataclass(frozen=True)
class Change:
    """The outcome of comparing one row.

    Attributes:
        key: the row.
        text: what to print.
        fails: whether `--compare` fails because of it.
    """

    key: str
    text: str
    fails: bool


def compare(
    rows: Iterable[Row], baseline: Mapping[str, Row], expected: Iterable[str]
) -> list[Change]:
    """Compares every row with the baseline.

    Args:
        rows: rows of this run.
        baseline: rows of the committed result, by key.
        expected: keys of the rows that this run should have measured.

    Returns:
        One change for each row that is slower, faster, noisy, new or missing.
    """
    rows = {row["key"]: row for row in rows}
    changes = [Change(k, "was not measured", True) for k in expected if k not in rows]
    for key, row in rows.items():
        ours = row["providers"]["ours"]
        if is_noisy(row):
            text = f"noise {ours['noise']:.0%} stays above {NOISY:.0%} after re-runs"
            changes.append(Change(key, text, True))
        if key not in baseline:
            changes.append(Change(key, "is in no committed result", True))
            continue
        before = baseline[key]["providers"]["ours"]
        change = ours["ratio"] / before["ratio"] - 1
        limit = tolerance(ours["noise"], before["noise"])
        text = f"ratio to {row['anchor']} {before['ratio']:.3f} -> {ours['ratio']:.3f}"
        if is_slower(row, baseline[key]):
            changes.append(Change(key, f"{change:+.0%} SLOWER: {text} (limit {limit:.0%})", True))
        elif 1 / (1 + change) - 1 > limit:
            changes.append(Change(key, f"{change:+.0%} faster: {text}", False))
    return changes
