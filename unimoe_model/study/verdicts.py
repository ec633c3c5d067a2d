"""Verdicts on claims, by the rule of the study.

A claim says that the first arm's measure is lower, or higher, than the second's. It is

- supported, if the adjusted p is at most alpha and the mean difference at least `least` in the
  claimed direction;
- not supported, if the confidence interval holds no difference of `least` or more in that
  direction;
- not decided, otherwise, and as long as seeds are missing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unimoe_model.study.measures import KINDS, arms_of
from unimoe_model.study.plan import Claim, Measure, Study
from unimoe_model.study.record import Record
from unimoe_model.study.statistics import holm, interval, sign_flip_p

SUPPORTED, NOT_SUPPORTED, NOT_DECIDED = "supported", "not supported", "not decided"
Results = Mapping[str, Mapping[int, Record]]
"""Runs by arm and seed."""


@dataclass(frozen=True)
class Finding:
    """Result of testing a claim.

    Attributes:
        claim: the claim.
        values: measures of both arms, one per pair of runs.
        difference: mean difference, first arm minus second; NaN without pairs.
        ends: confidence interval of the difference.
        p: p of the paired test in the claimed direction.
        adjusted: p adjusted for the number of claims.
        verdict: `"supported"`, `"not supported"` or `"not decided"`.
        missing: number of pairs that are not complete.
    """

    claim: Claim
    values: tuple[list[float], list[float]]
    difference: float
    ends: tuple[float, float]
    p: float
    adjusted: float
    verdict: str
    missing: int


def measured(results: Results, measure: Measure, arm: str) -> dict[int, float]:
    """Measure of an arm by seed, for seeds with all required runs."""
    needed = [arm, *arms_of(measure.options)]
    seeds = set.intersection(*(set(results.get(name, {})) for name in needed))
    compute = KINDS[measure.kind].compute
    return {
        seed: compute({name: results[name][seed] for name in needed}, arm, **measure.options)
        for seed in sorted(seeds)
    }


def findings(study: Study, results: Results) -> list[Finding]:
    """Tests the claims of a study on its complete runs."""
    pairs = [_pairs(claim, results) for claim in study.claims]
    p_values = [
        sign_flip_p(_sign(claim) * np.subtract(*own)) if own[0] else 1.0
        for claim, own in zip(study.claims, pairs, strict=True)
    ]
    adjusted = holm(p_values)
    return [
        _finding(study, claim, own, p, after)
        for claim, own, p, after in zip(study.claims, pairs, p_values, adjusted, strict=True)
    ]


def _pairs(claim: Claim, results: Results) -> tuple[list[float], list[float]]:
    first, second = (measured(results, claim.measure, arm) for arm in claim.arms)
    seeds = sorted(first.keys() & second.keys())
    return [first[seed] for seed in seeds], [second[seed] for seed in seeds]


def _finding(
    study: Study, claim: Claim, pairs: tuple[list[float], list[float]], p: float, adjusted: float
) -> Finding:
    planned = min(len(study.seeds_of(arm)) for arm in claim.arms)
    missing = planned - len(pairs[0])
    if not pairs[0]:
        ends = (-np.inf, np.inf)
        return Finding(claim, pairs, float("nan"), ends, p, adjusted, NOT_DECIDED, missing)
    differences = np.subtract(*pairs)
    ends = interval(differences, study.alpha)
    mean = float(differences.mean())
    verdict = NOT_DECIDED if missing else _verdict(claim, mean, ends, adjusted, study.alpha)
    return Finding(claim, pairs, mean, ends, p, adjusted, verdict, missing)


def _verdict(
    claim: Claim, mean: float, ends: Sequence[float], adjusted: float, alpha: float
) -> str:
    sign = _sign(claim)
    if adjusted <= alpha and sign * mean >= claim.least:
        return SUPPORTED
    if max(sign * end for end in ends) < claim.least:
        return NOT_SUPPORTED
    return NOT_DECIDED


def _sign(claim: Claim) -> int:
    return 1 if claim.expect == "greater" else -1
