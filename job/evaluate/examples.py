"""Selects held-out rows for the report: a few at random, the worst, the most changed and the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from job.config.schema import LabelSpec
from job.evaluate.label_metrics import stated_and_right
from job.evaluate.records import Answer, Comparison
from job.evaluate.sums import Floats
from job.evaluate.text_metrics import rouge

EACH = 4
PARTS = {
    "changed": "Most changed",
    "worst": "Worst after tuning",
    "best": "Best after tuning",
    "random": "At random",
}


def chosen(before: Sequence[Answer], after: Sequence[Answer], measured: Comparison) -> dict[str, list[int]]:
    """Return the rows of each part of the gallery, each row once: {"random": [3, 17], "worst": …}; empty without rows.

    Random rows are drawn first, from the run's seed and without regard to the results, so that they are a fair sample. The
    others are ranked by the share of labels right plus ROUGE-L (only ROUGE-L without labels).
    """
    if not after or len(before) != len(after):
        return {}
    old, new = (_scores(rows, labels_read(measured)) for rows in (before, after))
    parts = {"random": np.random.default_rng([measured.settings.seed, 3]).permutation(len(after))[:EACH].tolist()}
    taken = set(parts["random"])
    for name, order in (("worst", new), ("changed", _most_changed(new - old)), ("best", -new)):
        parts[name] = [index for index in np.argsort(order, kind="stable").tolist() if index not in taken][:EACH]
        taken.update(parts[name])
    return {name: parts[name] for name in PARTS if parts[name]}


def labels_read(measured: Comparison) -> dict[str, LabelSpec]:
    """Return how each label was read."""
    return {
        name: LabelSpec(column=name, values=label.values or label.classes or None, pattern=label.pattern)
        for name, label in measured.labels.items()
    }


def _scores(rows: Sequence[Answer], labels: Mapping[str, LabelSpec]) -> Floats:
    """Return the (n,) share of labels right plus ROUGE-L."""
    right = [
        [pair is not None and pair[0] == pair[1] for pair in stated_and_right(rows, name, label)[1]]
        for name, label in labels.items()
    ]
    return np.asarray(rouge_l(rows) + (np.mean(right, axis=0) if right else 0.0))


def rouge_l(rows: Sequence[Answer]) -> Floats:
    return rouge([row.reference for row in rows], [row.generated for row in rows])["rougeL"].rows[:, 0]


def _most_changed(change: Floats) -> Floats:
    """Return an order (lowest first) of the largest loss, the largest gain, the next loss, the next gain, and so on.

    By size only, the gains of a successful run would fill every place and hide what tuning broke.
    """
    loss, gain = (np.argsort(np.argsort(side, kind="stable")) for side in (change, -change))
    return np.where(change < 0, 2.0 * loss, np.where(change > 0, 2.0 * gain + 1, np.inf))
