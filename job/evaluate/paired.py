"""One set of rows measured before and after: every metric and its change, with an interval and a p.

Rows are paired: each resample draws the same rows for before and after, and each permutation swaps before and after
within a row; rows of one unit (a patient with several images) go together. Since a metric is a function of sums
(`scores.Sums`), all resamples of all metrics are one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from job.evaluate import intervals
from job.evaluate.scores import Floats, Sums

CELLS_AT_ONCE = 8_000_000
Span = tuple[float, float]


@dataclass(frozen=True)
class Settings:
    """How intervals and p are drawn: that many resamples and permutations, at this level, from this seed."""

    samples: int
    confidence: float
    seed: int


@dataclass(frozen=True)
class Pair:
    """One metric before and after, on the rows (n,) `counted` in both; the sums of the other rows are zero."""

    before: Sums
    after: Sums
    counted: NDArray[np.bool_]

    def subset(self, rows: NDArray[np.bool_]) -> Pair:
        return Pair(self.before.subset(rows), self.after.subset(rows), self.counted[rows])


def pair(before: Sums, after: Sums) -> Pair:
    """Keeps only the rows that have the metric both before and after."""
    counted = before.counted & after.counted
    return Pair(before.masked(counted), after.masked(counted), counted)


def measure(pairs: Mapping[str, Pair], units: NDArray[np.intp], settings: Settings) -> dict[str, dict[str, Any]]:
    """{"before", "after", "change"} → metric → {"value", "low", "high", "n"}, and "p" in a change.

    `units` (n,) numbers the unit of each row from 0. Proportions get closed intervals, all else the bootstrap's.
    """
    result: dict[str, dict[str, Any]] = {"before": {}, "after": {}, "change": {}}
    if not pairs:
        return result
    tables = [
        by_unit(np.hstack([one.before.rows for one in pairs.values()]), units),
        by_unit(np.hstack([one.after.rows for one in pairs.values()]), units),
    ]
    resampled = _resampled(tables, settings)
    left_out = [table.sum(axis=0) - table for table in tables]
    swapped = _swapped(tables, settings)
    start = 0
    for name, one in pairs.items():
        part, finish = slice(start, start := start + one.before.rows.shape[1]), one.before.finish
        values = [float(finish(table[:, part].sum(axis=0))) for table in tables]
        values.append(values[1] - values[0])
        if one.before.proportion:
            spans = _proportion_spans(one, units, settings.confidence)
        else:
            drawn = _with_change([finish(sums[:, part]) for sums in resampled])
            without = _with_change([finish(sums[:, part]) for sums in left_out])
            spans = [intervals.bca(*each, settings.confidence) for each in zip(values, drawn, without, strict=True)]
        for key, value, span in zip(result, values, spans, strict=True):
            result[key][name] = entry(value, span, int(one.counted.sum()))
        under_null = finish(swapped[1][:, part]) - finish(swapped[0][:, part])
        result["change"][name]["p"] = permutation_p(abs(values[2]), np.abs(under_null))
    return result


def permutation_p(observed: float, under_null: Floats) -> float:
    """The share of permutations at least as extreme, with the +1 of Phipson & Smyth 2010 ("should never be zero")."""
    extreme = int(np.count_nonzero(under_null >= observed - 1e-12 * max(1.0, observed)))
    return round((1 + extreme) / (1 + under_null.size), 6)


def by_unit(rows: Floats, units: NDArray[np.intp]) -> Floats:
    """(n, k) sums of rows to (units, k) sums of units."""
    total = np.zeros((int(units.max()) + 1, rows.shape[1]))
    np.add.at(total, units, rows)
    return total


def numbered(keys: Iterable[object]) -> NDArray[np.intp]:
    """0, 1, 2 … in place of arbitrary keys, in the order in which they first come."""
    seen: dict[object, int] = {}
    return np.array([seen.setdefault(key, len(seen)) for key in keys], np.intp)


def chunks(units: int, samples: int) -> Iterator[int]:
    """`samples` in parts whose (part, units) matrix fits comfortably in memory."""
    most = max(1, CELLS_AT_ONCE // units)
    for start in range(0, samples, most):
        yield min(most, samples - start)


def entry(value: float, span: Span, rows: int) -> dict[str, float | int | None]:
    """One measured number as it is stored; what is not defined (no row of a class, say) is None."""
    low, high = (round(bound, 6) if np.isfinite(bound) else None for bound in span)
    return {"value": round(value, 6) if np.isfinite(value) else None, "low": low, "high": high, "n": rows}


def _with_change(both: list[Floats]) -> list[Floats]:
    return [*both, both[1] - both[0]]


def _resampled(tables: Sequence[Floats], settings: Settings) -> list[Floats]:
    """For each (units, k) table, its (samples, k) sums when units are drawn with replacement, alike for all tables."""
    draw, units = np.random.default_rng([settings.seed, 0]), len(tables[0])
    sums: list[list[Floats]] = [[] for _ in tables]
    for size in chunks(units, settings.samples):
        times = draw.multinomial(units, np.full(units, 1 / units), size=size).astype(float)
        for table, into in zip(tables, sums, strict=True):
            into.append(times @ table)
    return [np.concatenate(parts) for parts in sums]


def _swapped(tables: Sequence[Floats], settings: Settings) -> list[Floats]:
    """The (samples, k) sums before and after when each unit's before and after are swapped by the toss of a coin.

    Approximate randomization: Noreen 1989; for BLEU and ROUGE, Riezler & Maxwell 2005.
    """
    before, after = tables
    toss = np.random.default_rng([settings.seed, 1])
    moved = np.concatenate(
        [
            toss.integers(0, 2, (size, len(before))).astype(float) @ (after - before)
            for size in chunks(len(before), settings.samples)
        ]
    )
    return [before.sum(axis=0) + moved, after.sum(axis=0) - moved]


def _proportion_spans(one: Pair, units: NDArray[np.intp], confidence: float) -> list[Span]:
    before, after = one.before.rows[one.counted, 0], one.after.rows[one.counted, 0]
    here = numbered(units[one.counted])
    gained, lost = float((after > before).mean()), float((after < before).mean())
    return [
        intervals.wilson(float(before.mean()), intervals.effective_rows(before, here), confidence),
        intervals.wilson(float(after.mean()), intervals.effective_rows(after, here), confidence),
        intervals.bonett_price(gained, lost, intervals.effective_rows(after - before, here), confidence),
    ]
