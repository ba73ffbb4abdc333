"""Reads labelled fields (finding, side, modality …) from generated texts and counts how often they are right.

The spec chooses one of two ways to read a label from text:

- `values`: the values that occur as whole words, in singular or plural, ignoring case. The longest value wins where two overlap,
  so "pleural effusion" is not also an "effusion". A text is right when it states exactly the reference label as present: a
  caption that lists every finding is not right, and neither is one that lists none.
- `pattern`: the first group of the first match of a regular expression, compared ignoring case.

With neither, the values are those that occur as reference labels. What an English text denies or leaves open it does not state:
"no effusion or nodule", "an effusion cannot be excluded" (`negation`). Values may themselves be negations ("no acute finding").
Other languages are not understood, though a pattern can express them. A pattern's match is never checked for negation.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import regex

from job.config.schema import LabelSpec, uncertain_key
from job.evaluate.negation import STRENGTH, Stated, assertions
from job.evaluate.records import Answer

log = logging.getLogger("job")

NONE = "(none)"
SEVERAL = "(several)"
OTHER = "(other)"
UNCERTAIN = "(uncertain)"
PATTERN_SECONDS = 1.0
"""Timeout of a pattern on one text. Nested repetitions can take forever on the wrong text, and Python's own `re` cannot be
stopped."""


def reader(spec: LabelSpec, references: Sequence[str]) -> tuple[dict[str, str], Callable[[str], str]]:
    """Return the labels that can be right, by folded spelling, spelled as in spec or data; and a function that reads one from
    text.

    `references` are the rows' reference labels. The function returns one of the labels, or NONE, SEVERAL, UNCERTAIN, or OTHER for
    anything else a pattern matched: never text of the caption itself, so that a table of labels holds only what spec and data
    name.
    """
    spelled = spellings(spec, references)
    find = finder(spec, references)

    def read(text: str) -> str:
        if spec.pattern is not None:
            stated = {spelled.get(folded(value), OTHER) for value in _matched(spec.pattern, text)}
            return next(iter(stated), NONE)
        found = find(text)
        present = [value for value, said in found.items() if said == "present"]
        without = UNCERTAIN if "uncertain" in found.values() else NONE
        return SEVERAL if len(present) > 1 else next(iter(present), without)

    return spelled, read


def spellings(spec: LabelSpec, references: Sequence[str]) -> dict[str, str]:
    """Return the labels that can be right, by folded spelling: the spec's values, or else those of the data."""
    known = spec.values if spec.values and spec.pattern is None else [*sorted(references), *(spec.values or ())]
    return {folded(value): value.strip() for value in known if value.strip()}


def truth(row: Answer, name: str) -> tuple[list[str], list[str]] | None:
    """Return the values that are present and those that the truth leaves open, of a label of which rows may have several; None if
    the row has no such label."""
    present, doubted = row.labels.get(name), row.labels.get(uncertain_key(name))
    return (present, doubted if isinstance(doubted, list) else []) if isinstance(present, list) else None


def has_several(rows: Sequence[Answer], name: str) -> bool:
    return any(isinstance(row.labels.get(name), list) for row in rows)


def finder(spec: LabelSpec, references: Sequence[str]) -> Callable[[str], dict[str, Stated]]:
    """Return a function that finds which labels a text mentions, in singular or plural, and how it states each."""
    spelled = spellings(spec, references)
    forms = {form: value for folded, value in spelled.items() for form in _forms(folded)} | spelled
    words = "|".join(r"\s+".join(map(re.escape, form.split())) for form in sorted(forms, key=len, reverse=True))
    expression = re.compile(rf"(?<!\w)({words})(?!\w)" if words else r"(?!)()", re.IGNORECASE)

    def find(text: str) -> dict[str, Stated]:
        found: dict[str, Stated] = {}
        for mention, said in assertions(expression, text).items():
            value = forms[folded(mention)]
            if STRENGTH[said] >= STRENGTH.get(found.get(value, ""), -1):
                found[value] = said
        return found

    return find


PLURALS = dict(pair.split() for pair in ("sis ses", "y ies", "um a", "us i", "a ae", "x xes", "ch ches", "ss sses")) | {
    "": "s"
}


def _forms(value: str) -> list[str]:
    """Return the English plurals that a value may have, and what it may be the plural of."""
    found = [value.removesuffix(one) + many for one, many in PLURALS.items() if value.endswith(one)]
    return found + [
        value.removesuffix(many) + one for one, many in PLURALS.items() if many != "a" and value.endswith(many)
    ]


def _matched(pattern: str, text: str) -> set[str]:
    try:
        match = regex.search(pattern, text, regex.IGNORECASE, timeout=PATTERN_SECONDS)
    except TimeoutError:
        log.warning(
            "evaluation.labels: the pattern %r took over %g s on a text of %d characters, which counts as having no label; "
            "rewrite it without nested repetitions",
            pattern,
            PATTERN_SECONDS,
            len(text),
        )
        return set()
    return {match[1]} if match and match[1] else set()


def stated_and_right(
    rows: Sequence[Answer], name: str, spec: LabelSpec
) -> tuple[tuple[str, ...], list[tuple[str, str] | None]]:
    """Return the classes and, for each row, (reference label, label stated by the generated text); None for a row without a
    label."""
    if has_several(rows, name):
        return _several(rows, name, spec)
    references = [str(row.labels.get(name) or "").strip() for row in rows]
    spelled, read = reader(spec, references)
    known = [spelled.get(folded(reference)) for reference in references]
    pairs = [(one, read(row.generated)) if one else None for row, one in zip(rows, known, strict=True)]
    return tuple(sorted(spelled.values())), pairs


def _several(
    rows: Sequence[Answer], name: str, spec: LabelSpec
) -> tuple[tuple[str, ...], list[tuple[str, str] | None]]:
    """Return the same with all findings of a row as one label: "effusion, possible edema"."""
    known = [truth(row, name) for row in rows]
    spelled = spellings(spec, [value for each in known if each for part in each for value in part])
    find = finder(spec, list(spelled.values()))

    def joined(present: Iterable[str], doubted: Iterable[str]) -> str:
        sure, open_ = (
            sorted({spelled[key] for value in part if (key := folded(value)) in spelled}) for part in (present, doubted)
        )
        return ", ".join([*sure, *(f"possible {value}" for value in open_ if value not in sure)]) or NONE

    def stated(text: str) -> str:
        found = find(text)
        return joined(*([value for value, said in found.items() if said == kind] for kind in ("present", "uncertain")))

    pairs = [(joined(*each), stated(row.generated)) if each else None for row, each in zip(rows, known, strict=True)]
    return tuple(sorted({pair[0] for pair in pairs if pair})), pairs


def confusion(pairs: Sequence[tuple[str, str] | None]) -> dict[str, dict[str, int]]:
    """Count how often each reference label was answered with each label: {reference: {stated: count}}, both sorted."""
    table: dict[str, Counter[str]] = {}
    for pair in pairs:
        if pair:
            table.setdefault(pair[0], Counter())[pair[1]] += 1
    return {reference: dict(sorted(table[reference].items())) for reference in sorted(table)}


def commonest_share(pairs: Sequence[tuple[str, str] | None]) -> float | None:
    """Return the accuracy of always answering the most common reference label; None without a labelled row."""
    counts = Counter(pair[0] for pair in pairs if pair)
    return max(counts.values()) / counts.total() if counts else None


def folded(value: str) -> str:
    return " ".join(value.casefold().split())
