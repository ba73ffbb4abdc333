"""Computes every metric before and after, and its change, on the same rows, with confidence intervals and p-values.

Rows are paired: each resample draws the same rows for before and after, and each permutation swaps before and after within a
row. Rows of one unit (a patient with several images) stay together. Since a metric is a function of sums
(`text_metrics.Sums`), all resamples of all metrics are one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from job.evaluate.records import Change, Estimate, Measured, Settings
from job.evaluate.sums import Floats, Sums

AT_ONCE = 500
"""How many resamples are held in memory at a time."""
NORMAL = NormalDist()
Span = tuple[float, float]


@dataclass(frozen=True)
class Pair:
    """One metric before and after. `counted` (n,) marks the rows that have it both times; the sums of all others are zero."""

    before: Floats
    after: Floats
    counted: NDArray[np.bool_]
    finish: Callable[[Floats], Floats]
    proportion: bool

    def subset(self, rows: NDArray[np.bool_]) -> Pair:
        return replace(self, before=self.before[rows], after=self.after[rows], counted=self.counted[rows])


def pair(before: Sums, after: Sums) -> Pair:
    """Keep only the rows that have the metric both before and after."""
    counted = before.counted & after.counted
    old, new = before.rows * counted[:, None], after.rows * counted[:, None]
    return Pair(old, new, counted, before.finish, before.proportion)


def measure(pairs: Mapping[str, Pair], units: NDArray[np.intp], settings: Settings) -> Measured:
    """Measure every pair before and after, and its change.

    `units` (n,) says which rows belong together. Proportions get closed-form intervals, all other metrics bootstrap intervals,
    and their changes jackknife intervals.
    """
    result = Measured()
    if not pairs:
        return result
    units = np.unique(units, return_inverse=True)[1]
    before = by_unit(np.hstack([one.before for one in pairs.values()]), units)
    after = by_unit(np.hstack([one.after for one in pairs.values()]), units)
    resampled = _resampled([before, after], settings)
    left_out = [table.sum(axis=0) - table for table in (before, after)]
    swapped = _swapped(before, after, settings)
    start = 0
    for name, one in pairs.items():
        part = slice(start, start := start + one.before.shape[1])

        def values(tables: Sequence[Floats], part: slice = part, one: Pair = one) -> list[Floats]:
            """Return the metric before, after and its change from the (…, k) sums before and after."""
            old, new = (one.finish(table[..., part]) for table in tables)
            return [old, new, new - old]

        measured = [float(value) for value in values([before.sum(axis=0), after.sum(axis=0)])]
        drawn = list(zip(measured, values(resampled), values(left_out), strict=True))
        if one.proportion:
            spans = _proportion_spans(one, units, settings.confidence) or [
                *(share_span(each, units, settings.confidence) for each in (one.before, one.after)),
                jackknife(measured[2], drawn[2][2], settings.confidence),
            ]
            sizes = [int(each[:, 1].sum()) for each in (one.before, one.after)]
            sizes.append(min(sizes))
        else:
            spans = [
                *(bca(*each, settings.confidence) for each in drawn[:2]),
                jackknife(measured[2], drawn[2][2], settings.confidence),
            ]
            sizes = [int(one.counted.sum())] * 3
        old, new, change = (estimate(*each) for each in zip(measured, spans, sizes, strict=True))
        p = permutation_p(abs(measured[2]), np.abs(values(swapped)[2]))
        moved = int((one.before != one.after).any(axis=1).sum())
        result.before[name], result.after[name], result.change[name] = (
            old,
            new,
            Change(**vars(change), p=p, moved=moved),
        )
    return result


def permutation_p(observed: float, under_null: Floats) -> float | None:
    """Return the share of permutations at least as extreme as `observed`; None if that is undefined.

    The observed value counts as one more permutation, so that p is never zero (Phipson & Smyth 2010).
    """
    if not math.isfinite(observed):
        return None
    extreme = int(np.count_nonzero(under_null >= observed - 1e-12 * max(1.0, observed)))
    return round((1 + extreme) / (1 + under_null.size), 6)


def by_unit(rows: Floats, units: NDArray[np.intp]) -> Floats:
    """Sum the rows (n, k) of each unit into (units, k). Units are numbered from 0."""
    total = np.zeros((int(units.max()) + 1, rows.shape[1]))
    np.add.at(total, units, rows)
    return total


def parts(samples: int) -> list[int]:
    """Split a number of resamples into batches of at most `AT_ONCE`."""
    return [min(AT_ONCE, samples - start) for start in range(0, samples, AT_ONCE)]


def estimate(value: float, span: Span, rows: int) -> Estimate:
    """Round a value and its interval for storage. Undefined values (for example, of a class without rows) become None."""
    known = [round(each, 6) if math.isfinite(each) else None for each in (value, *span)]
    return Estimate(known[0], known[1], known[2], rows)


def bca(value: float, resampled: Floats, left_out: Floats, confidence: float) -> Span:
    """Return the bias-corrected and accelerated bootstrap interval (Efron 1987, JASA 82).

    `resampled` holds the metric of each bootstrap resample. `left_out` holds it with one unit left out at a time (the
    jackknife), which gives the acceleration. The interval is second-order accurate, while the percentile interval is only
    first-order accurate; this matters for BLEU, perplexity and other skewed or biased statistics of a few hundred rows. The
    quantiles are first widened for small samples (Hesterberg 2015, The American Statistician 69): resamples of n units vary
    too little, by a factor of sqrt((n-1)/n), and their spread is itself an estimate, so a t quantile replaces the normal one.

    Non-finite values (from a resample without rows of a class) are dropped. If all values are equal, the interval is a point.
    Fewer than six units (at 95 %) give no interval, only NaNs (`_too_few`).
    """
    resampled, left_out = resampled[np.isfinite(resampled)], left_out[np.isfinite(left_out)]
    units = left_out.size
    if resampled.size == 0 or _too_few(units, confidence) or not math.isfinite(value):
        return math.nan, math.nan
    if np.ptp(resampled) == 0:
        return float(resampled[0]), float(resampled[0])
    below = (np.count_nonzero(resampled < value) + np.count_nonzero(resampled <= value)) / 2 / resampled.size
    edge = 0.5 / resampled.size
    bias = NORMAL.inv_cdf(min(max(below, edge), 1 - edge))
    distance = left_out.mean() - left_out
    spread = float(distance @ distance)
    acceleration = float((distance**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    half = math.sqrt(units / (units - 1)) * t_quantile((1 + confidence) / 2, units - 1)
    shifted = [bias - half, bias + half]
    levels = [NORMAL.cdf(bias + each / max(1 - acceleration * each, 1e-6)) for each in shifted]
    low, high = np.quantile(resampled, levels)
    return float(low), float(high)


def jackknife(value: float, left_out: Floats, confidence: float) -> Span:
    """Return Student's interval with the jackknife's standard error (Tukey 1958; Efron & Stein 1981), as `bca` does.

    A change of paired rows is nearly symmetric even where both of its sides are skewed, and then the bias and acceleration that
    `bca` estimates from few units are mostly noise: of a heavy-tailed loss that did not change, 95 % intervals of `bca` held the
    truth in 88 to 91 % of data sets of 30 and 120 patients, and these in 94 to 96 % (`make verdict-proof`).
    """
    left_out = left_out[np.isfinite(left_out)]
    units = left_out.size
    if _too_few(units, confidence) or not math.isfinite(value):
        return math.nan, math.nan
    error = math.sqrt((units - 1) * float(left_out.var()))
    half = t_quantile((1 + confidence) / 2, units - 1) * error
    return value - half, value + half


def _too_few(units: int, confidence: float) -> bool:
    """Whether so few units give no interval: their range misses the population median with probability 2^(1-n)."""
    return 2.0 ** (1 - units) > 1 - confidence


def t_quantile(level: float, degrees: float) -> float:
    """Return Student's t quantile, from the first three terms of its expansion around the normal quantile (Abramowitz & Stegun
    1964, 26.7.5).

    For 4 or more degrees of freedom and a `level` up to 0.975, it is within 0.3 % of the exact value.
    """
    z = NORMAL.inv_cdf(level)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def wilson(share: float, rows: float, confidence: float) -> Span:
    """Return the score interval of a proportion. It is valid even at 0 of n and n of n, where a bootstrap interval is a point.

    Wilson 1927, JASA 22; recommended by Brown, Cai & DasGupta 2001, Statistical Science 16. `rows` may be an effective number
    of rows (see `effective_rows`).
    """
    z = NORMAL.inv_cdf((1 + confidence) / 2)
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + (z / (2 * rows)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def bonett_price(gained: float, lost: float, rows: float, confidence: float) -> Span:
    """Return the interval for the change of a proportion that was measured twice on the same rows. It is never a point.

    `gained` and `lost` are the shares of rows that became right and wrong. Bonett & Price 2012, Journal of Educational and
    Behavioral Statistics 37; recommended by Fagerland, Lydersen & Laake 2014, Statistics in Medicine 33.
    """
    z = NORMAL.inv_cdf((1 + confidence) / 2)
    up, down = (gained * rows + 1) / (rows + 2), (lost * rows + 1) / (rows + 2)
    half = z * math.sqrt(max(up + down - (up - down) ** 2, 0.0) / (rows + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def effective_rows(values: Floats, units: NDArray[np.intp]) -> float:
    """Return how many independent rows `values` (n,) are worth when rows of one unit (a patient) resemble each other.

    This is n divided by the design effect (Kish 1965, "Survey Sampling"), which is the variance of the mean when whole units
    are drawn, divided by its variance when single rows are drawn. It is at most n. If all values are equal, the similarity
    within units is unknown; the function then returns the number of units, which is conservative.
    """
    units = np.unique(units, return_inverse=True)[1]
    rows, count = values.size, int(units.max(initial=-1)) + 1
    if count in (0, rows):
        return float(rows)
    residual = values - values.mean()
    if count == 1 or not residual.any():
        return float(count)
    of_units = np.bincount(units, residual)
    clustered = count / (count - 1) * float(of_units @ of_units)
    return min(float(rows), rows * float(residual @ residual) / clustered) if clustered > 0 else float(rows)


def _proportion_spans(one: Pair, units: NDArray[np.intp], confidence: float) -> list[Span]:
    """Return the intervals of a share before and after and of its change; nothing if the share is among other rows before than
    after."""
    among = one.before[:, 1] > 0
    if (among != (one.after[:, 1] > 0)).any() or not among.any():
        return []
    before, after, units = one.before[among, 0], one.after[among, 0], units[among]
    gained, lost = float((after > before).mean()), float((after < before).mean())
    return [
        wilson(float(before.mean()), effective_rows(before, units), confidence),
        wilson(float(after.mean()), effective_rows(after, units), confidence),
        bonett_price(gained, lost, effective_rows(after - before, units), confidence),
    ]


def share_span(sums: Floats, units: NDArray[np.intp], confidence: float) -> Span:
    """Return Wilson's interval of a share, from (rows, 2) sums of rows that are right and of rows that count."""
    among = sums[:, 1] > 0
    if not among.any():
        return math.nan, math.nan
    values = sums[among, 0]
    return wilson(float(values.mean()), effective_rows(values, units[among]), confidence)


def _resampled(tables: Sequence[Floats], settings: Settings) -> list[Floats]:
    """Return the (samples, k) sums of each (units, k) table over resampled units, which are the same for all tables."""
    draw, units = np.random.default_rng([settings.seed, 0]), len(tables[0])
    sums: list[list[Floats]] = []
    for size in parts(settings.bootstrap_samples):
        times = draw.multinomial(units, np.full(units, 1 / units), size).astype(float)
        sums.append([times @ table for table in tables])
    return [np.concatenate(of_table) for of_table in zip(*sums, strict=True)]


def _swapped(before: Floats, after: Floats, settings: Settings) -> list[Floats]:
    """Return the (samples, k) sums before and after, with before and after of each unit swapped at random.

    This is approximate randomization (Noreen 1989; for BLEU and ROUGE, Riezler & Maxwell 2005).
    """
    toss = np.random.default_rng([settings.seed, 1])
    sizes = parts(settings.bootstrap_samples)
    moved = np.concatenate([toss.integers(0, 2, (size, len(before))) @ (after - before) for size in sizes])
    return [before.sum(axis=0) + moved, after.sum(axis=0) - moved]
