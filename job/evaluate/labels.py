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

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import regex

from job.evaluate.negation import affirmed
from job.spec import LabelSpec

log = logging.getLogger("job")

NONE = "(none)"
SEVERAL = "(several)"
OTHER = "(other)"
PATTERN_SECONDS = 1.0
"""For a pattern and one text. Repetitions within repetitions can take for ever on the wrong text, and Python's own `re`
cannot be stopped."""


def reader(spec: LabelSpec, references: Sequence[str]) -> tuple[dict[str, str], Callable[[str], str]]:
    """The labels that can be right, spelled as spec or data spell them, by their folded spelling; and what reads one from text.

    `references` are the reference labels of the rows. What is read is one of the labels, or NONE, SEVERAL, or OTHER for what
    a pattern found besides: never text of the caption itself, so that a table of labels holds nothing that spec and data did
    not name.
    """
    spelled = {_folded(value): value.strip() for value in [*sorted(references), *(spec.values or ())] if value.strip()}
    longest_first = sorted(spelled.values(), key=len, reverse=True)
    words = "|".join(r"\s+".join(re.escape(word) for word in value.split()) for value in longest_first)
    expression = re.compile(rf"(?<!\w)({words})(?!\w)" if words else r"(?!)()", re.IGNORECASE)

    def read(text: str) -> str:
        found = affirmed(expression, text) if spec.pattern is None else _matched(spec.pattern, text)
        stated = {spelled.get(_folded(value), OTHER) for value in found}
        return SEVERAL if len(stated) > 1 else next(iter(stated), NONE)

    return spelled, read


def _matched(pattern: str, text: str) -> set[str]:
    try:
        match = regex.search(pattern, text, regex.IGNORECASE, timeout=PATTERN_SECONDS)
    except TimeoutError:
        log.warning(
            "evaluation.labels: the pattern %r took over %g s on a text of %d characters, which counts as one without a label; "
            "write it without repetitions inside of repetitions",
            pattern,
            PATTERN_SECONDS,
            len(text),
        )
        return set()
    return {match[1]} if match and match[1] else set()


def stated_and_right(
    rows: Sequence[Mapping[str, Any]], name: str, spec: LabelSpec
) -> tuple[tuple[str, ...], list[tuple[str, str] | None]]:
    """The classes, and for each row (reference label, label that the generated text states); None without a label."""
    references = [str((row.get("labels") or {}).get(name) or "").strip() for row in rows]
    spelled, read = reader(spec, references)
    pairs = [
        (spelled[_folded(reference)], read(str(row["generated"]))) if reference else None
        for row, reference in zip(rows, references, strict=True)
    ]
    return tuple(sorted(spelled.values())), pairs


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
