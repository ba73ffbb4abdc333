"""Joins tables by a column that they share: reports with the films of each study, questions with the picture they are about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from job.data.cells import as_text
from job.data.pixels import BadRow
from job.data.reading import perhaps
from job.data.text import as_line
from job.errors import DataError

Row = dict[str, Any]
Lines = Callable[[], Iterable[str]]
"""Yields a table's rows as lines of JSON, anew at each call."""


class Join(NamedTuple):
    """`key` is the column that all tables have. The first of `answers` that exists tells which tables' rows are the result;
    `used` chooses among all columns those to take from the others."""

    key: str
    answers: list[str]
    used: Callable[[Iterable[str]], frozenset[str]]


def joined(
    parts: Mapping[str, Lines], join: Join, read: Callable[[str], Row], field: str, notes: dict[str, bool]
) -> dict[str, Iterator[str]]:
    """Returns the tables that hold answers. Their rows get the columns of the other tables' rows with the same key: the value
    that all have, or the list of all. Adds to `notes` what was joined, once the rows are read. Raises DataError if tables cannot
    be joined."""
    columns = {title: _columns(lines, read) for title, lines in parts.items()}
    for title, names in columns.items():
        if join.key not in names:
            key = f"{join.key}{perhaps(join.key, names)}"
            raise DataError(f"{field}: dataset.join is {key}; {title} has no such column, but {', '.join(names)}")
    answer = next((name for name in join.answers if any(name in names for names in columns.values())), "")
    main = [title for title, names in columns.items() if answer in names]
    others = [title for title in columns if title not in main]
    if not (main and others):
        raise DataError(
            f"{field}: dataset.join is {join.key}, but there is nothing to join: {', '.join(main or others)} "
            f"{'all have' if main else 'have no'} column {answer or join.answers[0]}; put the other table (a "
            "sheet of a workbook as CSV) beside it"
        )
    used = join.used(dict.fromkeys(name for names in columns.values() for name in names))
    found: dict[str, dict[str, list[Any]]] = {}
    for title in others:
        taken = [name for name in columns[title] if name in used and name != join.key]
        for row in _rows(parts[title], read):
            if not (key := key_of(row.get(join.key))):
                continue
            values = found.setdefault(key, {})
            for name in taken:
                values.setdefault(name, []).append(row.get(name))
    said = f"joined with {', '.join(others)} by {join.key}"
    apart = {
        title: f"{field}: dataset.join is {join.key}, and no value of it in {title} is in {', '.join(others)}; write them alike"
        for title in main
    }
    return {title: _with(parts[title], join.key, found, read, said, notes, apart[title]) for title in main}


def _with(
    lines: Lines,
    key: str,
    found: dict[str, dict[str, list[Any]]],
    read: Callable[[str], Row],
    said: str,
    notes: dict[str, bool],
    apart: str,
) -> Iterator[str]:
    """Yields rows with the columns of their counterparts. Raises DataError with `apart` if no row has one."""
    count = alone = 0
    for line in lines():
        try:
            row = read(line)
        except BadRow:
            yield line
            continue
        theirs = found.get(key_of(row.get(key)))
        count, alone = count + 1, alone + (theirs is None)
        more = {name: several[0] if _alike(several) else several for name, several in (theirs or {}).items()}
        yield as_line({**more, **row})
    if alone and alone == count:
        raise DataError(apart)
    without = f", {alone} of {count} rows without a counterpart" if alone else ""
    notes[f"{said}{without}"] = False


def _columns(lines: Lines, read: Callable[[str], Row]) -> list[str]:
    names = dict[str, None]()
    for row in _rows(lines, read):
        names |= dict.fromkeys(row)
    return list(names)


def _rows(lines: Lines, read: Callable[[str], Row]) -> Iterator[Row]:
    for line in lines():
        try:
            yield read(line)
        except BadRow:
            continue


def _alike(several: list[Any]) -> bool:
    """Whether all values are one: both films of a study name its patient, who is then "P1", and not "P1, P1"."""
    return all(value == several[0] for value in several)


def key_of(value: Any) -> str:
    """Returns a key as text: 7, 7.0 and "7" are one. Rows whose key is empty have no counterpart."""
    return as_text(int(value) if isinstance(value, float) and value.is_integer() else value)
