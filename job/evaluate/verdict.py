"""Draws the one conclusion of a comparison.

A dozen metrics, each with its own test, move by chance more often than one in twenty. So one metric is chosen before anything
is measured, and it alone gets a verdict. "Better" or "worse" needs both the interval of the change and its permutation test:
either alone is wrong a little too often in small samples, in different ways (tests/evaluate/test_verdict.py measures how often).
Rows that are also in training are left out. A tuned model that is not better than one answer given to every row, or that
answers as well with the images of other rows, is never called better.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from job.config.schema import LabelSpec
from job.evaluate import bootstrap, metric_info
from job.evaluate import label_metrics as label_fields
from job.evaluate.bootstrap import Pair
from job.evaluate.findings import constant_findings
from job.evaluate.records import Answer, Change, ImageUse, Settings, Verdict
from job.evaluate.sums import Sums
from job.evaluate.text_metrics import bag_f1, is_closed, label_sums, losses, sample_scores, words

CANDIDATES = 12
"""How many of the references, and of the tuned model's answers, are tried as the one answer to every row."""
TRIED_ON = 200
"""Rows on which they are tried."""
CONSTANT, IMAGES, LEAKED = "constant", "images", "leaked"


def verdict(
    metric: str,
    pair: Pair | None,
    after: Sequence[Answer],
    labels: Mapping[str, LabelSpec],
    units: NDArray[np.intp],
    leaked: NDArray[np.bool_],
    settings: Settings,
    used: ImageUse | None,
) -> Verdict:
    """Judge the change of `metric`. `pair` is None if no row has it. `leaked` (n,) marks rows that are also in training."""
    different = len({" ".join(words(row.generated)) for row in after})
    if pair is None:
        return Verdict(metric, different=different)
    clean = pair.counted & ~leaked
    left_out = int((pair.counted & leaked).sum())
    rows, count = int(clean.sum()), len(np.unique(units[clean]))
    found = Verdict(metric, rows=rows, units=count, leaked=left_out, different=different)
    if count < metric_info.FEW:
        return replace(found, said="unproven" if left_out else "too few rows", doubts=[LEAKED] if left_out else [])
    change = _change(pair.subset(clean), units[clean], settings)
    found = replace(found, change=change)
    constant = constant_answer(metric, after, labels)
    over = None
    if constant is not None:
        over = _change(bootstrap.pair(constant, _sums(pair)).subset(clean), units[clean], settings)
        value = float(constant.finish((constant.rows * clean[:, None]).sum(axis=0)))
        found = replace(found, constant=round(value, 6), over_constant=over)
    said = metric_info.direction(metric, change, settings.confidence)
    if said != "better":
        return replace(found, said="unchanged" if said == "no clear change" and change.moved == 0 else said)
    doubts = [CONSTANT] if over and metric_info.direction(metric, over, settings.confidence) != "better" else []
    doubts += [IMAGES] if used and not _needs_images(used, settings.confidence) else []
    return replace(found, said="unproven" if doubts else "better", doubts=doubts)


def chosen_metric(given: str | None, labels: Sequence[str]) -> str:
    """Return the metric that the verdict is about: the one given, else whether the first label is right, else ROUGE-L."""
    return given or (f"{labels[0]}_accuracy" if labels else "rougeL")


def constant_answer(metric: str, after: Sequence[Answer], labels: Mapping[str, LabelSpec]) -> Sums | None:
    """Score the best single answer to every row; None for a metric that depends on more than the answers' words.

    For a label that is its commonest value. For a text, it is the reference or answer that has most words in common with all
    references.
    """
    for name, spec in labels.items():
        if (
            label_fields.has_several(after, name)
            and metric.startswith(f"{name}_")
            and metric.endswith(("_accuracy", "_f1"))
        ):
            return constant_findings(metric, after, name, spec)
        if metric in (f"{name}_accuracy", f"{name}_macro_f1"):
            classes, pairs = label_fields.stated_and_right(after, name, spec)
            counts = Counter(pair[0] for pair in pairs if pair)
            if not counts:
                return None
            commonest = counts.most_common(1)[0][0]
            return label_sums(name, classes, [pair and (pair[0], commonest) for pair in pairs])[metric]
    if metric not in metric_info.OF_WORDS:
        return None
    rows = after
    if metric == "closed_accuracy" or metric in metric_info.OPEN:
        rows = [row for row in after if is_closed(row.reference) != (metric in metric_info.OPEN)]
    text = _common_text(
        [row.reference for row in rows],
        [row.generated for row in rows],
        whole=metric in ("exact_match", "closed_accuracy"),
    )
    return sample_scores([replace(row, generated=text) for row in after], {}, {})[metric]


def image_use(
    before: Sequence[Answer], after: Sequence[Answer], units: NDArray[np.intp], settings: Settings
) -> ImageUse | None:
    """Measure how much the loss rises with the images of other rows; None if no row was measured so."""
    own, other = ([losses(rows, swapped=swapped) for rows in (before, after)] for swapped in (False, True))
    if not own[1].counted.any():
        return None
    old, new = (
        _change(bootstrap.pair(mine, theirs), units, settings) if mine.counted.any() else Change()
        for mine, theirs in zip(own, other, strict=True)
    )
    gain, without = (_gain(bootstrap.pair(*sides)) for sides in (own, other))
    return ImageUse(old, new, round(without / gain, 6) if gain < 0 and math.isfinite(without) else None)


def _gain(pair: Pair) -> float:
    """Return the change of a metric without its interval; NaN if no row has it both before and after."""
    return float(pair.finish(pair.after.sum(axis=0)) - pair.finish(pair.before.sum(axis=0)))


def _needs_images(used: ImageUse, confidence: float) -> bool:
    return metric_info.direction("loss", used.after, confidence) == "worse"


def _change(pair: Pair, units: NDArray[np.intp], settings: Settings) -> Change:
    return bootstrap.measure({"": pair}, units, settings).change[""]


def _sums(pair: Pair) -> Sums:
    return Sums(pair.after, pair.counted, pair.finish, pair.proportion)


def _common_text(references: Sequence[str], generated: Sequence[str], *, whole: bool) -> str:
    """Return the text that is nearest to all references: of most of them, if it has to be `whole`, else in its words."""
    tried = [text for texts in (references, generated) for text in _spread(Counter(texts))]
    step = -(-len(references) // TRIED_ON)
    against = [words(text) for text in references[::step]]

    def near(text: str) -> float:
        own = words(text)
        return sum(own == other if whole else bag_f1(other, own) for other in against)

    return max(tried, key=near)


def _spread(counts: Counter[str]) -> list[str]:
    """Return the commonest texts, and further ones evenly spread over the rest."""
    ranked = [text for text, _ in counts.most_common()]
    first, rest = ranked[: CANDIDATES // 2], ranked[CANDIDATES // 2 :]
    return first + rest[:: -(-len(rest) // (CANDIDATES // 2)) or 1]
