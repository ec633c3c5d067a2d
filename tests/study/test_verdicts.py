"""Verdicts on claims by the rule of the study."""

from dataclasses import replace
from pathlib import Path

import pytest
from records import made

from unimoe_model.study.plan import Arm, Claim, Measure, Study
from unimoe_model.study.tables import claims_table
from unimoe_model.study.verdicts import NOT_DECIDED, NOT_SUPPORTED, SUPPORTED, findings


def study_of(expect="greater", least=0.1, seeds=8, claims=1):
    arms = {name: Arm(name, "tune") for name in ("a", "b")}
    own = tuple(
        Claim(f"c{i}", "a is better.", Measure("accuracy", {}), ["a", "b"], expect, least)
        for i in range(claims)
    )
    return Study("study.yaml", "t", Path("recipe.yaml"), seeds, arms, own)


def results_of(differences, base=0.5):
    return {
        "a": {
            seed: made("a", seed, accuracy={"x": base + difference})
            for seed, difference in enumerate(differences)
        },
        "b": {seed: made("b", seed, accuracy={"x": base}) for seed in range(len(differences))},
    }


CLEAR = [0.2, 0.22, 0.18, 0.25, 0.3, 0.15, 0.21, 0.19]


@pytest.mark.parametrize(
    ("differences", "expect", "least", "verdict"),
    [
        (CLEAR, "greater", 0.1, SUPPORTED),
        (CLEAR, "less", 0.1, NOT_SUPPORTED),
        (CLEAR, "greater", 0.4, NOT_SUPPORTED),
        ([-d for d in CLEAR], "less", 0.1, SUPPORTED),
        ([0.01, -0.01] * 4, "greater", 0.1, NOT_SUPPORTED),
        ([0.3, -0.2, 0.4, -0.1, 0.2, -0.3, 0.1, 0.0], "greater", 0.05, NOT_DECIDED),
    ],
)
def test_rule(differences, expect, least, verdict):
    (found,) = findings(study_of(expect, least), results_of(differences))
    assert found.verdict == verdict
    assert found.difference == pytest.approx(sum(differences) / 8)


def test_nothing_is_decided_while_seeds_are_missing():
    (found,) = findings(study_of(seeds=9), results_of(CLEAR))
    assert (found.verdict, found.missing) == (NOT_DECIDED, 1)
    (none,) = findings(study_of(), {})
    assert (none.verdict, none.missing) == (NOT_DECIDED, 8)


def test_more_claims_need_lower_p():
    """Eight pairs of one sign have p 1/256, which 13 claims make 0.051."""
    assert findings(study_of(claims=12), results_of(CLEAR))[0].verdict == SUPPORTED
    found = findings(study_of(claims=13), results_of(CLEAR))
    assert [own.verdict for own in found] == [NOT_DECIDED] * 13
    assert found[0].adjusted == pytest.approx(13 / 256)


def test_seeds_are_paired():
    """Seeds differ much more than arms; only those that both arms have are compared."""
    results = results_of(CLEAR)
    for arm in results.values():
        for seed, record in arm.items():
            arm[seed] = replace(record, accuracy={"x": record.accuracy["x"] + 10 * seed})
    (found,) = findings(study_of(), results)
    assert found.verdict == SUPPORTED
    del results["b"][3]
    (found,) = findings(study_of(), results)
    assert found.missing == 1
    assert len(found.values[0]) == 7


def test_table():
    study = study_of()
    rows = claims_table(study, findings(study, results_of(CLEAR)))
    (row,) = rows.body
    assert row[:2] == ["a is better.", SUPPORTED]
    assert row[3:5] == ["a: 71.2", "b: 50.0"]
    assert row[5].startswith("21.2 (")
    assert len(row) == len(rows.head)
