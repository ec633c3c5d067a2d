"""What counts as a regression, on rows made up for it; nothing is timed here."""

import statistics

import pytest
import torch

from benchmarks.compare import compare, is_slower
from benchmarks.tables import best_peer, row_table, summary_table
from benchmarks.timing import noise_of_median
from benchmarks.visits import noise_of_visits


def row(key="permute[a]", ratio=1.0, noise=0.02, **providers):
    def figures(median_ms, ratio, noise):
        return {
            "median_ms": median_ms,
            "rate": 10.0,
            "share_of_limit": 0.5,
            "ratio": ratio,
            "noise": noise,
        }

    return {
        "key": key,
        "unit": "GB/s",
        "anchor": "dense",
        "rounds": 11,
        "unavailable": {},
        "providers": {
            "dense": figures(1.0, 1.0, 0.0),
            "ours": figures(ratio, ratio, noise),
            **{name: figures(ms, ms, 0.01) for name, ms in providers.items()},
        },
    }


def failing(rows, baseline, expected=()):
    changes = compare(rows, {r["key"]: r for r in baseline}, expected)
    return {change.key: change.text for change in changes if change.fails}


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.07])
def test_fifteen_percent_slower_always_fails(noise):
    failed = failing([row(ratio=1.15, noise=noise)], [row(noise=noise)])
    assert list(failed) == ["permute[a]"]
    assert "+15% SLOWER" in failed["permute[a]"]
    assert is_slower(row(ratio=1.15, noise=noise), row(noise=noise))


def test_what_noise_explains_passes():
    assert not failing([row(ratio=1.09)], [row()])
    assert not failing([row(ratio=1.12, noise=0.06)], [row(noise=0.07)])
    assert not is_slower(row(ratio=1.09), row())
    assert not is_slower(row(ratio=9.0), None)


def test_faster_is_said_and_passes():
    changes = compare([row(ratio=0.7)], {"permute[a]": row()}, ())
    assert [(c.fails, "faster" in c.text) for c in changes] == [(False, True)]


def test_seconds_alone_are_no_regression():
    slow_day = row()
    for figures in slow_day["providers"].values():
        figures["median_ms"] *= 3
    assert not failing([slow_day], [row()])


def test_missing_rows_baselines_and_noise_fail():
    assert failing([], [row()], ["permute[a]"]) == {"permute[a]": "was not measured"}
    assert "no committed result" in failing([row()], [])["permute[a]"]
    assert "noise 9%" in failing([row(noise=0.09)], [row()])["permute[a]"]


def test_noise_is_the_interval_of_the_median():
    assert noise_of_median([1.0] * 11) == 0.0
    values = [1 + 0.01 * i for i in range(-50, 51)]
    assert noise_of_median(values) == pytest.approx(0.10, abs=0.01)
    assert noise_of_median(values) == noise_of_median(values[::-1])
    assert noise_of_median([2 * v for v in values]) == pytest.approx(noise_of_median(values))


def test_noise_of_visits_is_that_of_their_median():
    assert noise_of_visits([2.0]) == noise_of_visits([2.0] * 5) == 0
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4000, 9, generator=generator).mul(0.1).add(1)
    spread = 1.96 * samples.median(1).values.std().item()
    typical = statistics.median(noise_of_visits(row) for row in samples.tolist())
    assert typical == pytest.approx(spread, rel=0.15)
    # One process in a bad place moves it little.
    calm = [0.98, 0.99, 1.0, 1.01, 1.02]
    assert noise_of_visits([*calm, 9.0]) < 3 * noise_of_visits(calm)


def test_tables_name_the_best_peer_and_never_dense_or_ours():
    measured = row(ratio=2.0, looped=3.0, zentorch=1.5, **{"ours-reference": 0.1})
    assert best_peer(measured) == "zentorch"
    assert best_peer(row()) is None
    text = "\n".join(row_table(measured) + summary_table([measured, row("b[c]")]))
    assert "ours / best peer (zentorch) 1.33" in text
    assert "2.00x dense" in text
    assert "GB/s" in text
