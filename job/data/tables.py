"""Reads files of rows into one lazy table through `datasets`: JSON, CSV and archives as lines, the others by column."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from job.data.columns import Choose, Rows, every, read_columns, titled
from job.data.encoded import looks_like_picture
from job.data.floats import Floats, is_whole
from job.data.joined import Join, joined
from job.data.nested import Selection, flat, rows_inside
from job.data.pixels import BadRow
from job.data.text import NOT_UTF8, as_line, checked, encoding_of, ending_of, open_text
from job.errors import DataError
from job.store.disk import disk

LONGEST = 10**9
"""Maximum characters of a line, and bytes of a file that is one list: each is read as a whole."""
LINE = "_line"
"""The only column of a table whose rows are lines of JSON. They are parsed on use: no column's type has to be guessed, and one
broken line spoils one row."""
PATIENT = "_patient"
"""A digest of DICOM's PatientID. It groups rows for the split, cannot be named in a spec, and is written nowhere."""
WHY = "_why"
"""Why a report has no image, if known; cannot be named in a spec."""
POINTER = b"version https://git-lfs.github.com/spec/"
EXCEL = (".xlsx", ".xlsm")
LONGEST_NAME = 100
"""Maximum number of characters in a column name."""
FIRST_LINE = 1000
"""Maximum characters of the first line of an object that is written over several lines."""
AT_ONCE = 100
"""Lines written at a time; some hold whole images."""


def read_table(
    files: list[Path],
    cache: Path,
    field: str,
    choose: Choose = every,
    wanted: Selection = Selection(),  # noqa: B008 - it is frozen
    join: Join | None = None,
) -> Rows:
    """Reads the rows of files of one kind. Raises DataError naming the first file that cannot be read."""
    for file in files:
        refuse_pointer(file, field)
    if ending_of(files[0]) in (".parquet", ".arrow"):
        if join:
            raise DataError(
                f"{field}: dataset.join joins CSV, JSON and Excel tables, and {files[0].name} is of another kind"
            )
        return read_columns(files, cache, field, choose)
    notes = dict[str, bool]()
    tables = {title: partial(lines_of, file, field, wanted, notes) for title, file in titled(files).items()}
    parts = joined(tables, join, read_line, field, notes) if join else {title: each() for title, each in tables.items()}
    name = " ".join(map(str, (*files, *wanted[:2], join.key if join else "")))
    rows = as_table(parts, cache, name, field, choose)
    return rows._replace(notes=tuple(notes), of_split=any(notes.values()))


def refuse_pointer(file: Path, field: str) -> None:
    """Raises DataError for a pointer, which a clone has in place of a file that was not fetched."""
    with disk(file), file.open("rb") as stream:
        if stream.read(len(POINTER)) == POINTER:
            raise DataError(f"{field}: {file} is a Git LFS pointer and not the file; fetch it with git lfs pull")


def lines_of(
    file: Path,
    field: str,
    wanted: Selection = Selection(),  # noqa: B008 - it is frozen
    notes: dict[str, bool] | None = None,
) -> Iterator[str]:
    """Yields a file as lines of JSON: its own, or one for each row of a CSV or item of a list, which may be in an object. CSV
    values stay text: patient 007 is not 7. Adds to `notes` which list of an object was read, and whether it is named after the
    split."""
    if ending_of(file) in EXCEL:
        yield from _workbook_lines(file, field, wanted, {} if notes is None else notes)
        return
    with disk(file):
        encoding = encoding_of(file)
    with open_text(file, encoding, newline="" if _is_csv(file) else "\n") as stream:
        try:
            if _is_csv(file):
                yield from _csv_lines(stream)
                return
            if stream.read(4096).lstrip().startswith("["):
                stream.seek(0)
                yield from map(as_line, json.loads(_whole(stream, "list")))
                return
            stream.seek(0)
            if (whole := _object(stream)) is not None:
                inside = rows_inside(whole, wanted)
                yield from map(as_line, inside.rows if inside else [whole])
                if inside and notes is not None:
                    notes[f"{file.name} holds {inside.why}"] = inside.of_split
                return
            stream.seek(0)
            yield from (checked(line) for line in _lines(stream) if line.strip())
        except (ValueError, RecursionError, EOFError, OSError, zlib.error, csv.Error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DataError(f"{field}: {file} cannot be read: {error}; fix it, or rewrite it in UTF-8") from error


def _workbook_lines(file: Path, field: str, wanted: Selection, notes: dict[str, bool]) -> Iterator[str]:
    from job.data.excel import rows_of_workbook

    try:
        with disk(file):
            yield from map(as_line, rows_of_workbook(file, field, wanted, _checked_names, notes))
    except ValueError as error:
        raise DataError(f"{field}: {file} cannot be read: {error}; fix it, or save the table as CSV") from error


def _whole(stream: TextIO, what: str) -> str:
    text = stream.read(LONGEST)
    if len(text) == LONGEST:
        raise ValueError(f"one {what} of over {LONGEST / 1e9:g} GB; write one row per line")
    return text


def _object(stream: TextIO) -> dict[str, Any] | None:
    """Returns the only object in a text; None for lines, each of which is an object or should be."""
    first = stream.readline(LONGEST)
    try:
        json.loads(first)
        if any(line.strip() for line in _lines(stream)):
            return None
    except ValueError:
        if len(first) > FIRST_LINE:
            return None
    stream.seek(0)
    try:
        whole = json.loads(_whole(stream, "object"))
    except ValueError:
        return None
    return whole if isinstance(whole, dict) else None


def _lines(stream: TextIO) -> Iterator[str]:
    while line := stream.readline(LONGEST):
        if len(line) == LONGEST:
            raise ValueError(f"a line of over {LONGEST / 1e9:g} billion characters")
        yield line


def _is_csv(file: Path) -> bool:
    return ending_of(file) in (".csv", ".tsv")


def _csv_lines(stream: Iterator[str]) -> Iterator[str]:
    """Yields rows by the names in the first non-empty line; null for a row with more fields than names."""
    csv.field_size_limit(2**31 - 1)
    head = next((line for line in stream if line.strip()), "")
    try:
        delimiter = csv.Sniffer().sniff(head, ",;\t|").delimiter
    except csv.Error:
        delimiter = ","
    # Strict: a quote that is never closed would swallow the rows after it.
    rows = csv.DictReader(chain([head], stream), delimiter=delimiter, strict=True, skipinitialspace=True)
    _checked_names(list(rows.fieldnames or ()))  # one may hold line breaks
    for row in rows:
        yield as_line(None if None in row else row)


def _checked_names(names: list[str]) -> list[str]:
    """Raises ValueError for a first line that does not name columns. Names may be empty, as that of an index."""
    if len(set(filter(None, names))) < len([*filter(None, names)]):
        raise ValueError("two columns have the same name")
    if any(map(_is_value, names)):  # users are shown column names, never values of rows
        raise ValueError("its first line is a row, not column names")
    return names


def _is_value(name: str) -> bool:
    """Whether this cannot be a column name: an image, a UID, or a whole text."""
    return looks_like_picture(name) or re.fullmatch(r"\d+(\.\d+){3,}", name) is not None or len(name) > LONGEST_NAME


def as_table(parts: Mapping[str, Iterable[str]], cache: Path, name: str, field: str, choose: Choose = every) -> Rows:
    """Writes lines, keyed by their source file, as one memory-mapped table to a file on scratch. No other table has its `name`.

    Raises DataError if a file has no lines or no line can be read, and whatever `choose` raises.
    """
    import pyarrow
    from datasets import Dataset

    cache.mkdir(parents=True, exist_ok=True)
    file = cache / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.arrow"
    partial, columns = file.with_suffix(f".{os.getpid()}"), dict[str, tuple[str, ...]]()
    whole, reason = dict[str, bool](), None
    with disk(cache), pyarrow.ipc.new_stream(str(partial), pyarrow.schema({LINE: pyarrow.string()})) as out:
        for title, lines in parts.items():
            left, there, count = iter(lines), dict[str, None](), 0
            while some := list(islice(left, AT_ONCE)):
                out.write_batch(pyarrow.record_batch({LINE: some}))
                count += len(some)
                for line in some:
                    try:
                        row = read_line(line)
                    except BadRow as error:
                        reason = error
                        continue
                    row = flat(row)
                    there |= dict.fromkeys(row)
                    for column, value in row.items():
                        if isinstance(value, float):
                            whole[column] = whole.get(column, True) and is_whole(value)
            if not count:
                raise DataError(f"{field}: {title} has no rows")
            if there:
                columns[title] = tuple(each for each in there if each not in (PATIENT, WHY))
    if not columns:
        raise DataError(f"{field}: {next(iter(parts))}: no row can be read: {reason}")
    choose(columns)
    partial.rename(file)
    floats = {column: Floats(each) for column, each in whole.items()}
    return Rows(Dataset.from_file(str(file)), tuple(every(columns)), {}, floats)


def read_line(line: str) -> dict[str, Any]:
    """Raises BadRow."""
    if line == NOT_UTF8:
        raise BadRow("line is not UTF-8; save the table as UTF-8")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRow("line is not JSON") from error
    if not isinstance(row, dict):
        raise BadRow("line is not a JSON object, or has more fields than there are columns")
    return row
