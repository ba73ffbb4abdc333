"""Groups the errors of answers as a radiologist would: findings missed and invented, the wrong side, the wrong degree.

Findings are those of the labels (`job.evaluate.label_metrics`). Sides and degrees are read from words of the two texts, whatever
they say it of: an answer has the wrong one if it names one that the reference text does not, where that names another. An answer
that names none is not wrong in this sense.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from job.config.schema import LabelSpec
from job.evaluate.findings import PRESENT, codes
from job.evaluate.label_metrics import NONE, OTHER, SEVERAL, UNCERTAIN, has_several, stated_and_right
from job.evaluate.records import Answer

SIDES = {
    "left": re.compile(r"\b(left|bilateral(ly)?|both|bibasilar)\b", re.IGNORECASE),
    "right": re.compile(r"\b(right|bilateral(ly)?|both|bibasilar)\b", re.IGNORECASE),
}
DEGREES = {
    "small": re.compile(r"\b(small|tiny|trace|(mild|minimal|slight|subtle)(ly)?|minor)\b", re.IGNORECASE),
    "moderate": re.compile(r"\bmoderate(ly)?\b", re.IGNORECASE),
    "large": re.compile(r"\b(large|massive|gross|(severe|marked|extensive)(ly)?)\b", re.IGNORECASE),
}
ABSENCE = re.compile(r"(no|none|normal|clear|unremarkable|negative|without)\b", re.IGNORECASE)
"""How values begin that name no finding."""
NAMES = {
    "missed": "Missed finding",
    "invented": "Invented finding",
    "side": "Wrong side",
    "degree": "Wrong degree",
}


@dataclass
class Errors:
    """The ids of the rows with an error of one kind, of how many rows could have it, and how often each value was wrong."""

    of: int = 0
    rows: list[str] = field(default_factory=list)
    values: Counter[str] = field(default_factory=Counter)


def error_groups(rows: Sequence[Answer], labels: Mapping[str, LabelSpec]) -> dict[str, Errors]:
    """Return the errors of each kind in `NAMES` that some row could have."""
    found = {kind: Errors() for kind in NAMES}
    pairs = [_findings(rows, name, spec) for name, spec in labels.items() if not _only_words(spec)]
    for place, row in enumerate(rows):
        true = {value for there, _, _ in pairs for value in there[place]}
        said = {value for _, stated, _ in pairs for value in stated[place]}
        if any(known[place] for _, _, known in pairs):
            _note(found["invented"], row, said - true)
            if true:
                _note(found["missed"], row, true - said)
        for kind, read in (("side", SIDES), ("degree", DEGREES)):
            right, stated = _read(read, row.reference), _read(read, row.generated)
            if right:
                _note(found[kind], row, stated - right)
    return {kind: each for kind, each in found.items() if each.of}


def _note(errors: Errors, row: Answer, values: Iterable[str]) -> None:
    wrong = sorted(values)
    errors.of += 1
    errors.rows += [row.id] if wrong else []
    errors.values.update(wrong)


def _read(words: Mapping[str, re.Pattern[str]], text: str) -> set[str]:
    return {name for name, pattern in words.items() if pattern.search(text)}


def _only_words(spec: LabelSpec) -> bool:
    """Whether a label's values are sides or degrees, which are groups of their own."""
    patterns = [*SIDES.values(), *DEGREES.values()]
    return bool(spec.values) and all(any(each.fullmatch(value) for each in patterns) for value in spec.values or ())


def _findings(rows: Sequence[Answer], name: str, spec: LabelSpec) -> tuple[list[set[str]], list[set[str]], list[bool]]:
    """Return the findings of each row that are there, those that its answer states, and whether the row has this label."""
    if has_several(rows, name):
        values, true, said = codes(rows, name, spec, [row.generated for row in rows])
        sides = [
            [{value for value, code in zip(values, line, strict=True) if code == PRESENT} for line in side]
            for side in (true, said)
        ]
        return sides[0], sides[1], [bool((line >= 0).all()) for line in true]
    pairs = stated_and_right(rows, name, spec)[1]
    none = {NONE, OTHER, SEVERAL, UNCERTAIN}

    def finding(value: str) -> set[str]:
        return set() if value in none or ABSENCE.match(value) else {value}

    return (
        [finding(pair[0]) if pair else set() for pair in pairs],
        [finding(pair[1]) if pair else set() for pair in pairs],
        [pair is not None and pair[1] not in (SEVERAL, OTHER) for pair in pairs],
    )
