"""Compares the answers before and after training."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from job.config.schema import LabelSpec
from job.errors import DataError
from job.evaluate import bootstrap, metric_info
from job.evaluate import label_metrics as label_fields
from job.evaluate.bootstrap import Pair
from job.evaluate.findings import codes, finding_tables
from job.evaluate.radeval import LABELS
from job.evaluate.records import Answer, Comparison, Gap, Group, LabelTable, Method, PerRow, Settings
from job.evaluate.sums import Floats
from job.evaluate.text_metrics import sample_scores, signatures
from job.evaluate.verdict import chosen_metric, image_use, verdict

MOST_GROUPS = 12
OTHER, MISSING = "(other)", "(missing)"


def compare(
    before_rows: Sequence[Answer],
    after_rows: Sequence[Answer],
    labels: Mapping[str, LabelSpec],
    groups: Sequence[str],
    settings: Settings,
    extra: tuple[PerRow, PerRow] = ({}, {}),
    *,
    metric: str | None = None,
    leaked: Collection[str] = (),
) -> Comparison:
    """Compare every metric before and after. `extra` holds further metrics as values per row, before and after. The
    verdict is about `metric` (see `chosen_metric`), on rows whose ids are not in `leaked`.

    Rows of one unit (such as a patient) are resampled and swapped together, since several images of one patient carry less
    information than images of as many patients. Raises DataError if before and after hold different rows.
    """
    if not before_rows or [row.id for row in before_rows] != [row.id for row in after_rows]:
        raise DataError(
            f"before ({len(before_rows)} rows) and after ({len(after_rows)} rows) must hold the same held-out rows in "
            "the same order; delete the evaluation folder of the output to measure both again"
        )
    keys = [f"row {row.id}" if row.unit is None else f"unit {row.unit}" for row in before_rows]
    units = np.unique(keys, return_inverse=True)[1]
    before, after = sample_scores(before_rows, labels, extra[0]), sample_scores(after_rows, labels, extra[1])
    pairs = {name: bootstrap.pair(before[name], after[name]) for name in before}
    pairs = {name: pair for name, pair in pairs.items() if pair.counted.any()}
    names = {column: group_names(before_rows, column) for column in groups}
    wanted = metric_info.primary(pairs)
    metric = chosen_metric(metric, list(labels))
    also_trained = np.array([row.id in leaked for row in after_rows])
    used = image_use(before_rows, after_rows, units, settings)
    gaps = {
        column: {each: gap for each in wanted if (gap := _gap(pairs[each], units, names[column], settings))}
        for column in groups
    }
    return Comparison(
        **vars(bootstrap.measure(pairs, units, settings)),
        groups={column: _by_group(pairs, units, names[column], settings) for column in groups},
        gaps=_flagged(gaps, 1 - settings.confidence),
        labels={
            name: _label_table(name, spec, before_rows, after_rows, units, settings.confidence, extra[1].get(LABELS))
            for name, spec in labels.items()
        },
        image_use=used,
        verdict=verdict(metric, pairs.get(metric), after_rows, labels, units, also_trained, settings, used),
        settings=Method(**vars(settings), rows=len(before_rows), units=int(units.max()) + 1, scorers=signatures()),
    )


def group_names(rows: Sequence[Answer], column: str) -> NDArray[np.str_]:
    """Return the group of each row (n,). If there are more than `MOST_GROUPS` groups, the rarest are merged as OTHER."""
    raw = [row.groups.get(column) for row in rows]
    names = np.array([MISSING if value is None or value == "" else str(value) for value in raw])
    found, counts = np.unique(names, return_counts=True)
    if len(found) <= MOST_GROUPS:
        return names
    common = found[np.argsort(-counts, kind="stable")[: MOST_GROUPS - 1]]
    return np.where(np.isin(names, common), names, OTHER)


def _by_group(
    pairs: Mapping[str, Pair], units: NDArray[np.intp], names: NDArray[np.str_], settings: Settings
) -> dict[str, Group]:
    result = {}
    for value in np.unique(names).tolist():
        inside = names == value
        own = {name: pair.subset(inside) for name, pair in pairs.items() if pair.counted[inside].any()}
        rows = int(inside.sum())
        result[value] = Group(rows, rows < metric_info.FEW, **vars(bootstrap.measure(own, units[inside], settings)))
    return result


def _gap(pair: Pair, units: NDArray[np.intp], names: NDArray[np.str_], settings: Settings) -> Gap | None:
    """Return the largest difference of a metric between two groups after tuning; None if fewer than two groups have enough
    rows.

    `p` is the share of random assignments to groups whose largest difference is at least as large as the observed one. This
    corrects for picking the two extremes of several groups. Where every unit is in one group, units are reassigned. Otherwise
    rows of one unit resemble each other across groups, so the groups of a unit's rows are shuffled within it, and then handed
    as a whole to another unit of as many rows.
    """
    whole = len(set(zip(units.tolist(), names.tolist(), strict=True))) == int(units.max()) + 1
    own = units if whole else np.arange(len(units))
    values, member = np.unique(names[np.unique(own, return_index=True)[1]], return_inverse=True)
    enough = [index for index, value in enumerate(values) if pair.counted[names == value].sum() >= metric_info.FEW]
    if len(enough) < 2:
        return None
    sums = bootstrap.by_unit(pair.after, own)

    def by_group(assigned: NDArray[np.intp]) -> Floats:
        """Return the metric of each group (groups, …) for assignments of units to groups (…, units)."""
        return np.stack([pair.finish((assigned == index).astype(float) @ sums) for index in enough])

    observed = by_group(member)
    shuffle = np.random.default_rng([settings.seed, 2])
    draw = partial(shuffle.permuted, axis=1) if whole else partial(_between_units, units, shuffle)
    drawn = [
        np.ptp(by_group(draw(np.tile(member, (size, 1)))), axis=0)
        for size in bootstrap.parts(settings.bootstrap_samples)
    ]
    p = bootstrap.permutation_p(float(np.ptp(observed)), np.concatenate(drawn))
    return Gap(
        value=round(float(np.ptp(observed)), 6),
        highest=str(values[enough[int(observed.argmax())]]),
        lowest=str(values[enough[int(observed.argmin())]]),
        p=p,
    )


def _between_units(units: NDArray[np.intp], shuffle: np.random.Generator, member: NDArray[np.intp]) -> NDArray[np.intp]:
    """Shuffle the groups (draws, rows) within each unit, and between units of as many rows."""
    sizes, found = np.bincount(units), member.copy()
    for size in np.unique(sizes):
        places = np.stack([np.flatnonzero(units == unit) for unit in np.flatnonzero(sizes == size)])
        inside = shuffle.permuted(member[:, places], axis=2)
        order = shuffle.permuted(np.tile(np.arange(len(places)), (len(member), 1)), axis=1)
        found[:, places] = np.take_along_axis(inside, order[:, :, None], axis=1)
    return found


def _flagged(gaps: dict[str, dict[str, Gap]], alpha: float) -> dict[str, dict[str, Gap]]:
    """Flag the gaps whose p is below alpha after Holm's correction for their number (Holm 1979, Scandinavian Journal of
    Statistics 6)."""
    ranked = sorted(
        (gap.p, column, metric) for column, of in gaps.items() for metric, gap in of.items() if gap.p is not None
    )
    result = {column: dict(of) for column, of in gaps.items()}
    for place, (p, column, metric) in enumerate(ranked):
        if p * (len(ranked) - place) >= alpha:
            break
        result[column][metric] = replace(result[column][metric], flagged=True)
    return result


def _label_table(
    name: str,
    spec: LabelSpec,
    before: Sequence[Answer],
    after: Sequence[Answer],
    units: NDArray[np.intp],
    confidence: float,
    by_chexbert: Sequence[Sequence[int]] | None,
) -> LabelTable:
    classes, pairs_before = label_fields.stated_and_right(before, name, spec)
    pairs_after = label_fields.stated_and_right(after, name, spec)[1]
    read = label_fields.stated_and_right([replace(row, generated=row.reference) for row in after], name, spec)[1]
    right = [pair[0] == pair[1] for pair in read if pair]
    table = LabelTable(
        values=list(spec.values) if spec.values is not None else None,
        pattern=spec.pattern,
        commonest_share=label_fields.commonest_share(pairs_after),
        ceiling=round(sum(right) / len(right), 6) if right else None,
    )
    if label_fields.has_several(after, name):
        texts = {"before": [row.generated for row in before], "after": [row.generated for row in after]}
        said = {when: codes(after, name, spec, each)[2] for when, each in texts.items()}
        findings, true, ceiling = codes(after, name, spec, [row.reference for row in after])
        tables = finding_tables(findings, true, said, ceiling, units, confidence, by_chexbert)
        return replace(table, findings=tables)
    others = {stated for pair in (*pairs_before, *pairs_after) if pair for stated in pair} - set(classes)
    return replace(
        table,
        classes=list(classes),
        stated=[*classes, *sorted(others)],
        confusion={"before": label_fields.confusion(pairs_before), "after": label_fields.confusion(pairs_after)},
    )
