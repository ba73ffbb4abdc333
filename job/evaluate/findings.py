"""Scores labels of which a row may have several: whether a text states each finding as the data do.

For each finding a row's truth is present, uncertain (named in `uncertain_column`) or absent, and so is what its text states; a
finding that a text does not mention is absent. Sensitivity, specificity and predictive values leave out rows whose truth is
uncertain. An uncertain statement is neither a hit nor a denial: it lowers sensitivity and specificity, and counts in neither
predictive value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from job.config.schema import LabelSpec, slug
from job.evaluate import bootstrap
from job.evaluate.label_metrics import finder, folded, spellings, truth
from job.evaluate.negation import Stated
from job.evaluate.radeval import CONDITIONS
from job.evaluate.records import Answer, Estimate, Finding
from job.evaluate.sums import Flags, Floats, Sums, macro_f1_from_sums, micro_f1_from_sums, share

CLASSES: tuple[Stated, ...] = get_args(Stated)
PRESENT, UNCERTAIN, ABSENT = range(3)
Codes = NDArray[np.int8]
"""Truth or statement of each row and finding (rows, findings) as an index into CLASSES; -1 for a row without a label."""


def codes(rows: Sequence[Answer], name: str, spec: LabelSpec, texts: Sequence[str]) -> tuple[list[str], Codes, Codes]:
    """Return the findings, the truth of each row, and what each of `texts` states."""
    known = [truth(row, name) for row in rows]
    findings = sorted(
        set(spellings(spec, [value for each in known if each for part in each for value in part]).values())
    )
    column = {folded(value): place for place, value in enumerate(findings)}
    true = np.full((len(rows), len(findings)), -1, np.int8)
    said = true.copy()
    find = finder(spec, findings)
    for row, (each, text) in enumerate(zip(known, texts, strict=True)):
        if each is None:
            continue
        true[row], said[row] = ABSENT, ABSENT
        for code, values in ((UNCERTAIN, each[1]), (PRESENT, each[0])):
            true[row, [column[folded(value)] for value in values if folded(value) in column]] = code
        for value, stated in find(text).items():
            said[row, column[folded(value)]] = CLASSES.index(stated)
    return findings, true, said


def finding_sums(name: str, findings: Sequence[str], true: Codes, said: Codes) -> dict[str, Sums]:
    """Return the metrics of all findings together, then four for each."""
    labelled: Flags = np.asarray((true >= 0).all(axis=1))
    sure: Flags = (true == PRESENT) | (true == ABSENT)
    counts = _counts(true == PRESENT, (said == PRESENT) & sure, sure)
    exact: Flags = np.asarray((true == said).all(axis=1)) & labelled
    scores = {
        f"{name}_accuracy": share(exact, labelled),
        f"{name}_macro_f1": Sums(counts, labelled, macro_f1_from_sums),
        f"{name}_micro_f1": Sums(counts, labelled, micro_f1_from_sums),
    }
    if (true == UNCERTAIN).any():
        open_counts = _counts(true == UNCERTAIN, said == UNCERTAIN, labelled[:, None])
        scores[f"{name}_uncertain_f1"] = Sums(open_counts, labelled, micro_f1_from_sums)
    return scores | finding_rates(findings, true, said)


def finding_rates(findings: Sequence[str], true: Codes, said: Codes, reader: str = "") -> dict[str, Sums]:
    """Return sensitivity, specificity and predictive values of each finding; the names end with `reader`."""
    scores: dict[str, Sums] = {}
    labelled: Flags = np.asarray((true >= 0).all(axis=1))
    for place, finding in enumerate(findings):
        is_there, is_not = true[:, place] == PRESENT, true[:, place] == ABSENT
        stated, denied = said[:, place] == PRESENT, said[:, place] == ABSENT
        of = {
            "sensitivity": (stated, is_there),
            "specificity": (denied, is_not),
            "ppv": (is_there, stated & (is_there | is_not)),
            "npv": (is_not, denied & (is_there | is_not)),
        }
        scores |= {
            f"{slug(finding)}_{rate}{reader}": share(right & among, among, labelled)
            for rate, (right, among) in of.items()
        }
    return scores


def as_chexbert_reads(
    findings: Sequence[str], true: Codes, read: Sequence[Sequence[int]]
) -> tuple[list[str], Codes, Codes, Codes]:
    """Return the findings that CheXbert knows, their truth, and what it reads from reference and answer of each row, from
    `radeval.LABELS`."""
    known = [place for place, finding in enumerate(findings) if folded(finding) in CONDITIONS]
    columns = [CONDITIONS.index(folded(findings[place])) for place in known]
    values, code = np.array(read, np.int8).reshape(len(true), 2 * len(CONDITIONS)), {1: PRESENT, -1: UNCERTAIN}
    sides = [
        np.vectorize(lambda value: code.get(value, ABSENT), [np.int8])(side[:, columns]) if known else side[:, :0]
        for side in np.hsplit(values, 2)
    ]
    return [findings[place] for place in known], true[:, known], sides[0], sides[1]


def constant_findings(metric: str, rows: Sequence[Answer], name: str, spec: LabelSpec) -> Sums | None:
    """Return the best score of `metric` of one answer given to every row: the commonest set of findings, or every finding."""
    findings, true, _ = codes(rows, name, spec, [""] * len(rows))
    if not (true >= 0).any():
        return None
    sets, counts = np.unique(true[(true >= 0).all(axis=1)], axis=0, return_counts=True)
    tried = []
    for each in (
        sets[counts.argmax()],
        np.full(len(findings), PRESENT, np.int8),
        np.full(len(findings), UNCERTAIN, np.int8),
    ):
        said = np.where(true >= 0, each, -1).astype(np.int8)
        scores = finding_sums(name, findings, true, said)
        if metric not in scores:
            return None
        tried.append(scores[metric])
    return max(tried, key=lambda sums: float(np.nan_to_num(sums.finish(sums.rows.sum(axis=0)))))


def finding_tables(
    findings: Sequence[str],
    true: Codes,
    said: dict[str, Codes],
    ceiling: Codes,
    units: NDArray[np.intp],
    confidence: float,
    read: Sequence[Sequence[int]] | None = None,
) -> dict[str, Finding]:
    """Return for each finding its prevalence, the table of truth and statement before and after, and the share of reference texts
    that the rules read as the data say, and that CheXbert does, of which `read` is `radeval.LABELS`."""
    tables = {}
    learned = as_chexbert_reads(findings, true, read)[:3] if read is not None else ([], true, true)
    for place, finding in enumerate(findings):
        own = true[:, place]
        sure = (own == PRESENT) | (own == ABSENT)
        there = (own[sure] == PRESENT).astype(float)
        prevalence = Estimate()
        if sure.any():
            span = bootstrap.wilson(float(there.mean()), bootstrap.effective_rows(there, units[sure]), confidence)
            prevalence = bootstrap.estimate(float(there.mean()), span, int(sure.sum()))
        agreed = _agreement(own, ceiling[:, place])
        column = learned[0].index(finding) if finding in learned[0] else None
        confusion = {when: _confusion(own, each[:, place]) for when, each in said.items()}
        by_chexbert = None if column is None else _agreement(own, learned[2][:, column])
        tables[finding] = Finding(slug(finding), prevalence, agreed, confusion, by_chexbert)
    return tables


def _agreement(true: NDArray[np.int8], read: NDArray[np.int8]) -> float | None:
    labelled = true >= 0
    return round(float((read[labelled] == true[labelled]).mean()), 6) if labelled.any() else None


def _counts(is_there: Flags, stated: Flags, among: Flags) -> Floats:
    """Return (tp, fp, fn) of each finding in each row, (rows, 3 × findings)."""
    parts = (is_there & stated, ~is_there & stated & among, is_there & ~stated)
    return np.stack(parts, axis=-1).reshape(len(is_there), -1).astype(float)


def _confusion(true: NDArray[np.int8], said: NDArray[np.int8]) -> dict[str, dict[str, int]]:
    return {
        one: {other: int(((true == row) & (said == column)).sum()) for column, other in enumerate(CLASSES)}
        for row, one in enumerate(CLASSES)
        if (true == row).any()
    }
