"""Labelled fields (finding, side, modality …): which label a generated text states, and how often it is the right one.

A label is read from text in one of two ways, given by the spec:

- `values`: the set of values that occur as whole words, ignoring case. The longest value wins where two overlap, so
  "pleural effusion" is not also an "effusion". A text is right when that set is exactly the reference label: a caption
  that lists every finding is not right, and neither is one that lists none.
- `pattern`: the first group of the first match of a regular expression, compared ignoring case.

With neither, the values are those that occur as reference labels. A value that English words deny is not stated: "no
effusion or nodule", "an effusion is not seen" (`negation`). Values may be denials themselves ("no acute finding"). Of
other languages nothing is understood; a pattern may be. A pattern is taken at its word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from job.evaluate.negation import affirmed

NONE = "(none)"
SEVERAL = "(several)"
OTHER = "(other)"


class LabelSpec(Protocol):
    """What this module needs of `evaluation.labels.<name>` in the spec; read-only, so that a frozen model fits."""

    @property
    def values(self) -> Sequence[str] | None: ...

    @property
    def pattern(self) -> str | None: ...


@dataclass(frozen=True)
class LabelReader:
    """Reads one label from text. `classes` are the labels that can be right, as the spec or the data spells them."""

    classes: tuple[str, ...]
    expression: re.Pattern[str]
    by_pattern: bool

    def read(self, text: str) -> str:
        """The label that `text` states: one of `classes`, or NONE, SEVERAL, or OTHER for what a pattern found besides.

        Never text of the caption itself, so that a table of labels holds nothing that spec and data did not name.
        """
        if self.by_pattern:
            match = self.expression.search(text)
            found = {match[1] or ""} - {""} if match else set()
        else:
            found = affirmed(self.expression, text)
        stated = {self.canonical(value) for value in found}
        if len(stated) > 1:
            return SEVERAL
        return stated.pop() if stated else NONE

    def canonical(self, value: str) -> str:
        """`value` in the spelling of `classes`, or OTHER."""
        return self.spelling.get(_folded(value), OTHER)

    @cached_property
    def spelling(self) -> dict[str, str]:
        return {_folded(name): name for name in self.classes}


def reader(spec: LabelSpec, references: Sequence[str]) -> LabelReader:
    """A reader for `spec`; `references` are the reference labels of the rows, which become classes of their own.

    Raises `ValueError` when the pattern has no group, and `re.error` when it is not a regular expression.
    """
    spelled = {_folded(value): value.strip() for value in [*sorted(references), *(spec.values or ())] if value.strip()}
    classes = tuple(sorted(spelled.values()))
    if spec.pattern is not None:
        expression = re.compile(spec.pattern, re.IGNORECASE)
        if not expression.groups:
            raise ValueError(f"the pattern {spec.pattern!r} has no group; put the label in parentheses")
        return LabelReader(classes, expression, by_pattern=True)
    longest_first = sorted(classes, key=len, reverse=True)
    words = "|".join(r"\s+".join(re.escape(word) for word in value.split()) for value in longest_first)
    return LabelReader(classes, re.compile(rf"(?<!\w)({words})(?!\w)" if words else r"(?!)()", re.IGNORECASE), False)


def stated_and_right(
    rows: Sequence[Mapping[str, Any]], name: str, spec: LabelSpec
) -> tuple[tuple[str, ...], list[tuple[str, str] | None]]:
    """The classes, and for each row (reference label, label that the generated text states); None without a label."""
    references = [str((row.get("labels") or {}).get(name) or "").strip() for row in rows]
    read = reader(spec, [reference for reference in references if reference])
    pairs = [
        (read.canonical(reference), read.read(str(row["generated"]))) if reference else None
        for row, reference in zip(rows, references, strict=True)
    ]
    return read.classes, pairs


def confusion(pairs: Sequence[tuple[str, str] | None]) -> dict[str, dict[str, int]]:
    """How often each reference label was answered with each label: {reference: {stated: count}}, both sorted."""
    table: dict[str, Counter[str]] = {}
    for pair in pairs:
        if pair:
            table.setdefault(pair[0], Counter())[pair[1]] += 1
    return {reference: dict(sorted(table[reference].items())) for reference in sorted(table)}


def commonest_share(pairs: Sequence[tuple[str, str] | None]) -> float | None:
    """The accuracy of always answering the commonest reference label; None without a labelled row."""
    counts = Counter(pair[0] for pair in pairs if pair)
    return max(counts.values()) / counts.total() if counts else None


def _folded(value: str) -> str:
    return " ".join(value.casefold().split())
