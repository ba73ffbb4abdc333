"""Before against after on the same rows: published examples, coverage at the stated rate, p, and reproducibility."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from job.evaluate import bootstrap, sums, text_metrics
from job.evaluate.bootstrap import Pair
from job.evaluate.records import Settings
from tests.evaluate.conftest import answers_of

ALL = np.ones


def means(before: Any, after: Any) -> Pair:
    """The pair of a mean over rows."""
    both = []
    for values in (before, after):
        rows = np.stack([np.asarray(values, float), np.ones(len(values))], axis=-1)
        both.append(sums.Sums(rows, np.ones(len(values), bool), sums.ratio))
    return bootstrap.pair(*both)


def measured(before: Any, after: Any, samples: int = 300, seed: int = 0, units: Any = None) -> dict[str, Any]:
    units = np.arange(len(before)) if units is None else units
    result = asdict(bootstrap.measure({"mean": means(before, after)}, units, Settings(samples, 0.95, seed)))
    return {when: result[when]["mean"] for when in result}


def test_intervals_of_a_skewed_mean_and_its_change_cover_at_the_stated_rate() -> None:
    draw, runs, hits = np.random.default_rng(1), 500, {"before": 0, "after": 0, "change": 0}
    truth = {"before": 1 / 4, "after": 1 / 2, "change": 1 / 4}
    for seed in range(runs):
        shared = draw.beta(1, 3, 30)
        result = measured(shared, 0.5 * shared + 0.5 * draw.beta(3, 1, 30), 400, seed)
        for when in hits:
            hits[when] += result[when]["low"] <= truth[when] <= result[when]["high"]
    for count in hits.values():
        assert count / runs == pytest.approx(0.95, abs=0.025)


def test_intervals_of_bleu_cover_the_value_of_the_whole_population(make_rows: Callable[..., Any]) -> None:
    size, runs = 3000, 200
    before, after = make_rows(0.2, size, wordy=False), make_rows(0.7, size)
    sums = [text_metrics.sample_scores(answers_of(rows), {}, {})["bleu"] for rows in (before, after)]
    whole = bootstrap.pair(*sums)
    truth = [float(one.finish(one.rows.sum(axis=0))) for one in sums]
    draw, hits = np.random.default_rng(2), np.zeros(2)
    for seed in range(runs):
        chosen = np.zeros(size, bool)
        chosen[draw.choice(size, 40, replace=False)] = True
        result = asdict(bootstrap.measure({"bleu": whole.subset(chosen)}, np.arange(40), Settings(300, 0.95, seed)))
        for place, (when, true) in enumerate((("after", truth[1]), ("change", truth[1] - truth[0]))):
            hits[place] += result[when]["bleu"]["low"] <= true <= result[when]["bleu"]["high"]
    assert hits / runs == pytest.approx(0.95, abs=0.035)


def test_p_is_uniform_when_nothing_changed() -> None:
    draw = np.random.default_rng(3)
    found = np.sort([measured(draw.random(25), draw.random(25), 199, seed)["change"]["p"] for seed in range(500)])
    # Kolmogorov-Smirnov: 1.63 / sqrt(500) is its 1 % point
    assert np.abs(found - np.arange(1, 501) / 500).max() < 1.63 / 500**0.5 + 1 / 200


def test_p_is_the_share_of_all_swaps_that_are_as_extreme() -> None:
    change = np.array([0.3, 0.1, 0.4, -0.05])
    extreme = np.mean(
        [abs(np.dot(signs, change)) >= abs(change.sum()) - 1e-12 for signs in itertools.product((1, -1), repeat=4)]
    )
    p = measured(np.zeros(4), change, 4000)["change"]["p"]
    assert p == pytest.approx(extreme, abs=0.02)


def test_p_is_never_zero() -> None:
    assert measured(np.zeros(100), np.ones(100), 200)["change"]["p"] == pytest.approx(1 / 201, abs=1e-6)


def test_pairing_makes_the_interval_of_a_change_narrow() -> None:
    rows = np.random.default_rng(4).random(50)
    result = measured(rows, rows + 0.01 * np.random.default_rng(5).random(50))
    width = {when: result[when]["high"] - result[when]["low"] for when in result}
    assert width["change"] < width["after"] / 20


def test_rows_of_one_patient_are_drawn_together() -> None:
    values = np.random.default_rng(6).random(20).repeat(5)
    together = measured(0 * values, values, units=np.arange(20).repeat(5))["after"]
    alone = measured(0 * values, values)["after"]
    assert together["high"] - together["low"] > 1.7 * (alone["high"] - alone["low"])
    assert together["n"] == 100


def test_the_same_seed_gives_the_same_numbers_and_another_does_not() -> None:
    rows = np.random.default_rng(7).random((2, 30))
    assert measured(*rows, seed=1) == measured(*rows, seed=1) != measured(*rows, seed=2)


def test_memory_is_bounded_by_drawing_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(8).random((2, 30))
    whole = measured(*rows)
    monkeypatch.setattr(bootstrap, "AT_ONCE", 7)
    assert measured(*rows) == whole


def test_a_row_without_the_metric_on_one_side_is_left_out_of_both() -> None:
    pair = bootstrap.pair(
        sums.Sums(np.array([[1.0, 1], [0, 0], [3, 1]]), np.array([True, False, True]), sums.ratio),
        sums.Sums(np.array([[2.0, 1], [9, 1], [0, 0]]), np.array([True, True, False]), sums.ratio),
    )
    result = asdict(bootstrap.measure({"mean": pair}, np.arange(3), Settings(100, 0.95, 0)))
    assert (result["before"]["mean"]["value"], result["after"]["mean"]["value"], result["change"]["mean"]["n"]) == (
        1,
        2,
        1,
    )


@pytest.mark.parametrize(
    ("share", "rows", "low", "high"),
    [(0.8, 10, 0.4902, 0.9433), (0.0, 20, 0.0, 0.1611), (1.0, 20, 0.8389, 1.0)],
)
def test_wilson_gives_known_paired(share: float, rows: int, low: float, high: float) -> None:
    assert bootstrap.wilson(share, rows, 0.95) == pytest.approx((low, high), abs=1e-4)


def test_bonett_price_gives_the_interval_of_the_airway_example() -> None:
    # Fagerland, Lydersen & Laake 2014, table 1: of 21 children, 1 changed one way and 7 the other.
    assert bootstrap.bonett_price(1 / 21, 7 / 21, 21, 0.95) == pytest.approx((-0.508, -0.013), abs=1e-3)


@pytest.mark.parametrize(("degrees", "exact"), [(4, 2.7764), (9, 2.2622), (29, 2.0452), (999, 1.9623)])
def test_t_quantiles_are_those_of_the_tables(degrees: int, exact: float) -> None:
    assert bootstrap.t_quantile(0.975, degrees) == pytest.approx(exact, rel=3e-3)


def test_the_jackknife_of_a_mean_is_students_interval() -> None:
    values = np.random.default_rng(9).exponential(size=25)
    half = 2.0639 * values.std(ddof=1) / 5
    left_out = (values.sum() - values) / 24
    assert bootstrap.jackknife(values.mean(), left_out, 0.95) == pytest.approx(
        (values.mean() - half, values.mean() + half), rel=1e-3
    )


def test_intervals_of_equal_values_are_a_point() -> None:
    assert bootstrap.bca(0.5, np.full(100, 0.5), np.full(10, 0.5), 0.95) == (0.5, 0.5)
    assert bootstrap.jackknife(0.5, np.full(10, 0.5), 0.95) == (0.5, 0.5)


def test_intervals_of_no_finite_value_are_undefined() -> None:
    assert np.isnan(bootstrap.bca(0.5, np.full(100, np.nan), np.full(10, 0.5), 0.95)).all()
    assert np.isnan(bootstrap.jackknife(0.5, np.full(10, np.nan), 0.95)).all()


@pytest.mark.parametrize(("patients", "confidence", "enough"), [(1, 0.95, 0), (5, 0.95, 0), (6, 0.95, 1), (5, 0.9, 1)])
def test_few_patients_give_no_interval(patients: int, confidence: float, enough: int) -> None:
    """Resamples of n lie within their range, which misses the median of the population in 2^(1-n) of all samples."""
    left_out = np.linspace(0.4, 0.6, patients)
    low, _ = bootstrap.bca(0.5, np.linspace(0.4, 0.6, 100), left_out, confidence)
    assert np.isfinite(low) == enough
    assert np.isfinite(bootstrap.jackknife(0.5, left_out, confidence)[0]) == enough


def test_one_patient_counts_as_one_row() -> None:
    assert bootstrap.effective_rows(np.array([0.0, 1.0]), np.zeros(2, dtype=int)) == 1


def test_independent_rows_are_worth_themselves() -> None:
    assert bootstrap.effective_rows(np.arange(9.0), np.arange(9)) == 9


def test_rows_of_a_unit_that_are_alike_are_worth_one_row() -> None:
    units = np.repeat(np.arange(200), 5)
    values = (np.arange(200) % 2).repeat(5).astype(float)
    assert bootstrap.effective_rows(values, units) == pytest.approx(200, rel=0.02)


def test_rows_of_a_unit_that_differ_are_worth_no_more_than_they_are() -> None:
    assert bootstrap.effective_rows(np.tile([0.0, 1.0], 50), np.repeat(np.arange(50), 2)) == 100


def test_wilson_with_effective_rows_covers_when_rows_come_in_patients() -> None:
    draw, covered, naive, runs = np.random.default_rng(0), 0, 0, 400
    units = np.repeat(np.arange(40), 6)
    for _ in range(runs):
        right = (draw.random(240) < draw.beta(0.8, 0.8, 40).repeat(6)).astype(float)
        low, high = bootstrap.wilson(right.mean(), bootstrap.effective_rows(right, units), 0.95)
        covered += low <= 0.5 <= high
        low, high = bootstrap.wilson(right.mean(), 240, 0.95)
        naive += low <= 0.5 <= high
    assert covered / runs == pytest.approx(0.95, abs=0.03)
    assert naive / runs < 0.85
