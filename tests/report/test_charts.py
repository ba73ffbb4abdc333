from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from job.report import charts


def test_a_step_that_was_made_again_counts_once_with_its_last_value() -> None:
    log = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": None},
        {"step": 4, "loss": float("nan")},
    ]
    assert charts.series(log, "loss") == [(1, 3.0), (2, 1.0)]


def test_a_long_run_is_thinned_and_keeps_its_mean() -> None:
    points = [(step, step % 7) for step in range(100_000)]
    thin = charts.thinned(points)
    assert len(thin) <= charts.MOST_POINTS
    assert sum(y for _, y in thin) / len(thin) == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.2, 3.1), (-4, 7), (5, 5), (0, 0), (1e-9, 2e-4), (0, 123_456), (-2, -2)]
)
def test_ticks_are_few_and_enclose_the_data(low: float, high: float) -> None:
    ticks = charts.ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9


@pytest.mark.parametrize("values", [(1.0, 1.0), (0.0, 0.0), (3.0, 1.0), (1e-7, 2e-4), (5.0, -5.0)])
def test_a_chart_is_well_formed_and_within_its_frame(values: tuple[float, float]) -> None:
    drawing = charts.line_chart("A <b> & c", {"x": [(1, values[0]), (2, values[1])]})
    root = ET.fromstring(drawing)
    assert "A <b> & c" in root.attrib["aria-label"]
    line = root.find("polyline")
    assert line is not None
    for pair in line.attrib["points"].split():
        x, y = map(float, pair.split(","))
        assert charts.LEFT <= x <= charts.WIDTH
        assert 0 <= y <= charts.HEIGHT - charts.BOTTOM
