"""Tables of a study as rows of text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unimoe_model.study.measures import KINDS, final_loss, routing_information
from unimoe_model.study.plan import Study, Table
from unimoe_model.study.record import Record
from unimoe_model.study.verdicts import Finding, Results


@dataclass(frozen=True)
class Rows:
    """A table.

    Attributes:
        head: column titles.
        body: rows, with one cell per column.
    """

    head: Sequence[str]
    body: Sequence[Sequence[str]]


def claims_table(study: Study, found: Sequence[Finding]) -> Rows:
    """One row per claim: verdict, both arms, difference with interval, p, the paper's figure."""
    percent = f"{100 * (1 - study.alpha):g} %"
    head = ["claim", "verdict", "measure", "first arm", "second arm", f"difference ({percent})"]
    head += ["p", "adjusted p", "pairs", "the paper"]
    return Rows(head, [_claim_row(study, finding) for finding in found])


def arms_table(study: Study, table: Table, results: Results) -> Rows:
    """One row per arm: mean and standard deviation of accuracies, loss and mutual information."""
    tasks = list(
        dict.fromkeys(
            task
            for arm in table.arms
            for record in results.get(arm, {}).values()
            for task in record.accuracy
        )
    )
    head = ["arm", "seeds", *(f"{task}, %" for task in tasks), "mean, %", "final loss"]
    head += ["mutual information, bits"]
    body = [
        _arm_row(study.arms[arm].label, list(results.get(arm, {}).values()), tasks)
        for arm in table.arms
    ]
    return Rows(head, body)


def _claim_row(study: Study, finding: Finding) -> list[str]:
    claim, kind = finding.claim, KINDS[finding.claim.measure.kind]
    labels = [study.arms[arm].label for arm in claim.arms]

    def shown(value: float) -> str:
        if not math.isfinite(value):
            return "-" if math.isnan(value) else ("-∞" if value < 0 else "∞")
        # Adding zero keeps values that round to zero from being shown as -0.0.
        return f"{round(kind.scale * value, kind.digits) + 0:.{kind.digits}f}"

    means = [
        f"{label}: {shown(float(np.mean(own)) if own else float('nan'))}"
        for label, own in zip(labels, finding.values, strict=True)
    ]
    low, high = finding.ends
    missing = f" of {len(finding.values[0]) + finding.missing}" if finding.missing else ""
    return [
        claim.claim,
        finding.verdict,
        kind.title,
        *means,
        f"{shown(finding.difference)} ({shown(low)} to {shown(high)})",
        f"{finding.p:.4f}",
        f"{finding.adjusted:.4f}",
        f"{len(finding.values[0])}{missing}",
        claim.paper,
    ]


def _arm_row(label: str, records: Sequence[Record], tasks: Sequence[str]) -> list[str]:
    def over(values: Sequence[float], scale: float, digits: int) -> str:
        if not values:
            return ""
        scaled = scale * np.asarray(values)
        spread = f" ± {scaled.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{scaled.mean():.{digits}f}{spread}"

    by_task = [[r.accuracy[task] for r in records if task in r.accuracy] for task in tasks]
    whole = [
        float(np.mean(list(r.accuracy.values()))) for r in records if len(r.accuracy) == len(tasks)
    ]
    routed = [routing_information({r.arm: r}, r.arm) for r in records if r.routing is not None]
    return [
        label,
        str(len(records)),
        *(over(own, 100, 1) for own in by_task),
        over(whole, 100, 1),
        over([final_loss({r.arm: r}, r.arm) for r in records], 1, 3),
        over(routed, 1, 3),
    ]
