"""Intervals: published examples, and coverage at the stated rate in simulations."""

from __future__ import annotations

import numpy as np
import pytest

from job.evaluate import intervals


@pytest.mark.parametrize(
    ("share", "rows", "low", "high"),
    [(0.8, 10, 0.4902, 0.9433), (0.0, 20, 0.0, 0.1611), (1.0, 20, 0.8389, 1.0)],
)
def test_wilson_gives_known_intervals(share: float, rows: int, low: float, high: float) -> None:
    assert intervals.wilson(share, rows, 0.95) == pytest.approx((low, high), abs=1e-4)


def test_bonett_price_gives_the_interval_of_the_airway_example() -> None:
    # Fagerland, Lydersen & Laake 2014, table 1: of 21 children, 1 changed one way and 7 the other.
    assert intervals.bonett_price(1 / 21, 7 / 21, 21, 0.95) == pytest.approx((-0.508, -0.013), abs=1e-3)


@pytest.mark.parametrize(("degrees", "exact"), [(4, 2.7764), (9, 2.2622), (29, 2.0452), (999, 1.9623)])
def test_t_quantiles_are_those_of_the_tables(degrees: int, exact: float) -> None:
    assert intervals.t_quantile(0.975, degrees) == pytest.approx(exact, rel=5e-4)


def test_bca_of_equal_values_is_a_point() -> None:
    assert intervals.bca(0.5, np.full(100, 0.5), np.full(10, 0.5), 0.95) == (0.5, 0.5)


def test_bca_of_no_finite_value_is_undefined() -> None:
    assert np.isnan(intervals.bca(0.5, np.full(100, np.nan), np.full(10, 0.5), 0.95)).all()


def test_independent_rows_are_worth_themselves() -> None:
    assert intervals.effective_rows(np.arange(9.0), np.arange(9)) == 9


def test_rows_of_a_unit_that_are_alike_are_worth_one_row() -> None:
    units = np.repeat(np.arange(200), 5)
    values = (np.arange(200) % 2).repeat(5).astype(float)
    assert intervals.effective_rows(values, units) == pytest.approx(200, rel=0.02)


def test_rows_of_a_unit_that_differ_are_worth_no_more_than_they_are() -> None:
    assert intervals.effective_rows(np.tile([0.0, 1.0], 50), np.repeat(np.arange(50), 2)) == 100


def test_wilson_with_effective_rows_covers_when_rows_come_in_patients() -> None:
    draw, covered, naive, runs = np.random.default_rng(0), 0, 0, 400
    units = np.repeat(np.arange(40), 6)
    for _ in range(runs):
        right = (draw.random(240) < draw.beta(0.8, 0.8, 40).repeat(6)).astype(float)
        low, high = intervals.wilson(right.mean(), intervals.effective_rows(right, units), 0.95)
        covered += low <= 0.5 <= high
        low, high = intervals.wilson(right.mean(), 240, 0.95)
        naive += low <= 0.5 <= high
    assert covered / runs == pytest.approx(0.95, abs=0.03)
    assert naive / runs < 0.85
