"""Defines metrics as sums over rows, so that any resample of rows is scored by a matrix product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Sums:
    """One metric of one set of rows: `rows` (n, k) adds up over rows, `finish` turns (…, k) sums into (…) values.

    `counted` (n,) says which rows have this metric at all; the others are zero in `rows`. `proportion` means that a row is
    either right (1) or wrong (0), which allows better intervals than the bootstrap's.
    """

    rows: Floats
    counted: NDArray[np.bool_]
    finish: Callable[[Floats], Floats]
    proportion: bool = False


def ratio(sums: Floats) -> Floats:
    """Divide the first column by the second; NaN where the second is zero. A mean is this over (sum, count)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan))


def macro_f1_from_sums(sums: Floats) -> Floats:
    """Mean over classes of 2tp / (2tp + fp + fn), from (…, 3 × classes) sums of (tp, fp, fn).

    A class that is neither a reference nor an answer in these rows is left out, as in scikit-learn's `f1_score(…,
    average="macro", zero_division=nan)`. Its interval is too narrow when a class has only a few rows, since a class that is
    not drawn cannot count: in simulations with a rare class, 95 % intervals covered the true value in 94 % of sets of 50 rows,
    87 % of 20 and 70 % of 10.
    """
    true, false, missed = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    size = 2 * true + false + missed
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = np.where(size > 0, 2 * true / size, 0.0)
        return np.asarray(scores.sum(axis=-1) / np.where((size > 0).any(axis=-1), (size > 0).sum(axis=-1), np.nan))


def macro_f1_over_all(sums: Floats) -> Floats:
    """Mean over all labels of 2tp / (2tp + fp + fn), from (…, 3 × labels) sums of (tp, fp, fn). As in RadEval, a label that is
    nowhere counts as 0."""
    true, size = sums[..., 0::3], 2 * sums[..., 0::3] + sums[..., 1::3] + sums[..., 2::3]
    return np.asarray((2 * true / np.where(size > 0, size, 1)).mean(axis=-1))


def micro_f1_from_sums(sums: Floats) -> Floats:
    """F1 of all classes together, from (…, 3 × classes) sums of (tp, fp, fn); NaN where nothing is a reference or an answer."""
    true, size = (
        2 * sums[..., 0::3].sum(axis=-1),
        (2 * sums[..., 0::3] + sums[..., 1::3] + sums[..., 2::3]).sum(axis=-1),
    )
    return ratio(np.stack([true, size], axis=-1))


def share(right: NDArray[np.bool_], among: NDArray[np.bool_], counted: NDArray[np.bool_] | None = None) -> Sums:
    """The share of the rows `among` (n,) that are `right`. `counted` are those that have the metric; default: those `among`."""
    sums = np.stack([right & among, among], axis=-1).astype(float)
    return Sums(sums, among if counted is None else counted, ratio, proportion=True)
