"""Before against after: what `metrics.json` holds, from the stored rows of the two evaluations.

{"before": {metric: {"value", "low", "high", "n"}}, "after": …, "change": {metric: {…, "p"}},
 "groups": {column: {value: {"rows", "too_few", "before": …, "after": …, "change": …}}},
 "gaps": {column: {metric: {"value", "highest", "lowest", "p", "flagged"}}},
 "labels": {name: {"values", "pattern", "classes", "stated", "commonest_share",
                       "confusion": {"before": {reference: {stated: rows}}, "after": …}}},
 "settings": {"bootstrap_samples", "confidence", "seed", "rows", "units", "scorers"}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from job.errors import DataError
from job.evaluate import labels as label_fields
from job.evaluate import paired, scores, wording
from job.evaluate.paired import Pair, Settings
from job.evaluate.scores import Floats, Row
from job.spec import LabelSpec

MOST_GROUPS = 12
OTHER, MISSING = "(other)", "(missing)"


def compare(
    before_rows: Sequence[Row],
    after_rows: Sequence[Row],
    labels: Mapping[str, LabelSpec],
    groups: Sequence[str],
    *,
    bootstrap_samples: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """The content of `metrics.json` (see above); `DataError` when before and after are not of the same rows.

    A row may name a `unit` (an index of its patient, say): rows of one unit are resampled and swapped together, since
    several images of one patient tell less than as many patients.
    """
    if not before_rows or [row["id"] for row in before_rows] != [row["id"] for row in after_rows]:
        raise DataError(
            f"before ({len(before_rows)} rows) and after ({len(after_rows)} rows) must hold the same held-out rows in "
            "the same order; delete the evaluation folder of the output to measure both again"
        )
    settings = Settings(bootstrap_samples, confidence, seed)
    keys = [f"row {row['id']}" if row.get("unit") is None else f"unit {row['unit']}" for row in before_rows]
    units = np.unique(keys, return_inverse=True)[1]
    before, after = scores.sample_scores(before_rows, labels), scores.sample_scores(after_rows, labels)
    pairs = {name: paired.pair(before[name], after[name]) for name in before}
    pairs = {name: pair for name, pair in pairs.items() if pair.counted.any()}
    names = {column: group_names(before_rows, column) for column in groups}
    wanted = wording.primary(pairs)
    return {
        **paired.measure(pairs, units, settings),
        "groups": {column: _by_group(pairs, units, names[column], settings) for column in groups},
        "gaps": {
            column: {metric: gap for metric in wanted if (gap := _gap(pairs[metric], units, names[column], settings))}
            for column in groups
        },
        "labels": {name: _label_facts(name, spec, before_rows, after_rows) for name, spec in labels.items()},
        "settings": {
            "bootstrap_samples": bootstrap_samples,
            "confidence": confidence,
            "seed": seed,
            "rows": len(before_rows),
            "units": int(units.max()) + 1,
            "scorers": scores.signatures(),
        },
    }


def group_names(rows: Sequence[Row], column: str) -> NDArray[np.str_]:
    """The group of each row (n,); beyond the commonest `MOST_GROUPS`, groups are taken together as OTHER."""
    raw = [(row.get("groups") or {}).get(column) for row in rows]
    names = np.array([MISSING if value is None or value == "" else str(value) for value in raw])
    found, counts = np.unique(names, return_counts=True)
    if len(found) <= MOST_GROUPS:
        return names
    common = found[np.argsort(-counts, kind="stable")[: MOST_GROUPS - 1]]
    return np.where(np.isin(names, common), names, OTHER)


def _by_group(
    pairs: Mapping[str, Pair], units: NDArray[np.intp], names: NDArray[np.str_], settings: Settings
) -> dict[str, Any]:
    result = {}
    for value in np.unique(names).tolist():
        inside = names == value
        own = {name: pair.subset(inside) for name, pair in pairs.items() if pair.counted[inside].any()}
        rows = int(inside.sum())
        result[value] = {"rows": rows, "too_few": rows < wording.FEW, **paired.measure(own, units[inside], settings)}
    return result


def _gap(pair: Pair, units: NDArray[np.intp], names: NDArray[np.str_], settings: Settings) -> dict[str, Any] | None:
    """The largest difference of a metric between two groups of enough rows after tuning; None without two such groups.

    `p` is the share of random re-assignments of units to groups whose own largest difference is as large, so that
    having chosen the extremes among several groups is paid for. `flagged` means p < 1 - confidence.
    """
    whole = len(set(zip(units.tolist(), names.tolist(), strict=True))) == int(units.max()) + 1
    own = units if whole else np.arange(len(units))  # a unit in several groups cannot be re-assigned as a whole
    values, member = np.unique(names[np.unique(own, return_index=True)[1]], return_inverse=True)
    enough = [index for index, value in enumerate(values) if pair.counted[names == value].sum() >= wording.FEW]
    if len(enough) < 2:
        return None
    sums = paired.by_unit(pair.after, own)

    def by_group(assigned: NDArray[np.intp]) -> Floats:
        """(groups, …) values of (…, units) groups."""
        return np.stack([pair.finish((assigned == index).astype(float) @ sums) for index in enough])

    observed = by_group(member)
    shuffle = np.random.default_rng([settings.seed, 2])
    drawn = [
        np.ptp(by_group(shuffle.permuted(np.tile(member, (size, 1)), axis=1)), axis=0)
        for size in paired.parts(settings.samples)
    ]
    p = paired.permutation_p(float(np.ptp(observed)), np.concatenate(drawn))
    return {
        "value": round(float(np.ptp(observed)), 6),
        "highest": str(values[enough[int(observed.argmax())]]),
        "lowest": str(values[enough[int(observed.argmin())]]),
        "p": p,
        "flagged": p is not None and p < 1 - settings.confidence,
    }


def _label_facts(name: str, spec: LabelSpec, before: Sequence[Row], after: Sequence[Row]) -> dict[str, Any]:
    classes, pairs_before = label_fields.stated_and_right(before, name, spec)
    pairs_after = label_fields.stated_and_right(after, name, spec)[1]
    besides = {stated for pair in (*pairs_before, *pairs_after) if pair for stated in pair} - set(classes)
    return {
        "values": list(spec.values) if spec.values is not None else None,
        "pattern": spec.pattern,
        "classes": list(classes),
        "stated": [*classes, *sorted(besides)],
        "commonest_share": label_fields.commonest_share(pairs_after),
        "confusion": {"before": label_fields.confusion(pairs_before), "after": label_fields.confusion(pairs_after)},
    }
