"""Reads the sheets of Excel workbooks row by row, through openpyxl."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

from job.data.nested import Selection, lists_of_split
from job.errors import DataError, SpecError

LARGEST = 500_000_000
"""Maximum bytes of a workbook when unpacked: openpyxl keeps all texts in memory."""
ENCRYPTED = b"\xd0\xcf\x11\xe0"
"""How workbooks with a password begin, and those in the old format (.xls)."""

Row = dict[str, Any]
Check = Callable[[list[str]], list[str]]


def rows_of_workbook(file: Path, field: str, wanted: Selection, check: Check, notes: dict[str, bool]) -> Iterator[Row]:
    """Yields the rows of the sheets that are meant: those named after the split or, if none is named after one, the first with
    an answer column, else the first. The first row that is not empty names the columns; `check` raises ValueError for names that
    cannot be. Adds to `notes` which sheets were read. Raises DataError for a file that cannot be read, SpecError if openpyxl is
    not installed."""
    try:
        from openpyxl import load_workbook
    except ImportError as missing:
        raise SpecError(
            f"{field}: {file.name} is an Excel workbook and needs the excel extra (pip install 'vision-lora-job[excel]'); "
            "install it, or save the table as CSV"
        ) from missing
    warnings.filterwarnings("ignore", module="openpyxl")  # of styles and validation, which say nothing of values
    refusal: ValueError | None = None
    try:
        _refuse_unreadable(file, field)
        with closing(load_workbook(file, read_only=True, data_only=True)) as book:
            heads = dict[str, list[str]]()
            for sheet in book.worksheets:
                if sheet.sheet_state == "visible" and (head := next(_rows(sheet), None)):
                    heads[sheet.title] = [str("" if name is None else name).strip() for name in head]
            if not heads:
                return
            try:
                named = lists_of_split([*heads], wanted)
            except ValueError as refused:
                refusal = refused
                raise
            chosen = named or [_with_answers(heads, wanted.own)]
            rest = [title for title in heads if title not in chosen]
            left = f" (not read: {', '.join(rest)})" if rest else ""
            notes[f"{file.name} holds {'sheets' if len(chosen) > 1 else 'sheet'} {', '.join(chosen)}{left}"] = (
                named is not None
            )
            for title in chosen:
                try:
                    names = check(heads[title])
                except ValueError as refused:
                    refusal = refused
                    raise
                rows = _rows(book[title])
                next(rows)
                for values in rows:
                    there = dict(zip(names, values, strict=False))
                    yield {name: there.get(name) for name in names if name}
    except DataError:
        raise
    except Exception as error:  # openpyxl may raise anything on a broken file, and quote a cell
        of_disk = isinstance(error, OSError) and error.errno is not None
        if of_disk or error is refusal:
            raise
        raise DataError(
            f"{field}: {file} cannot be read as an Excel workbook; save it anew as .xlsx, or as CSV"
        ) from error


def _with_answers(heads: dict[str, list[str]], own: frozenset[str]) -> str:
    return next((title for title, names in heads.items() if own & set(names)), next(iter(heads)))


def _rows(sheet: Any) -> Iterator[list[Any]]:
    """Yields the values of rows that are not empty."""
    sheet.reset_dimensions()  # some programs write that a sheet has one cell
    for row in sheet.iter_rows(values_only=True):
        values = [_plain(value) for value in row]
        if any(value not in (None, "") for value in values):
            yield values


def _plain(value: Any) -> Any:
    """Returns a cell as JSON can hold it: dates as ISO 8601, and None for an error such as #N/A."""
    from openpyxl.cell.cell import ERROR_CODES
    from openpyxl.utils.escape import unescape

    if isinstance(value, str):
        return None if value in ERROR_CODES else unescape(value).replace("\r\n", "\n")
    if isinstance(value, datetime):
        return str(value.date() if value.time() == time() else value)
    return str(value) if isinstance(value, date | time | timedelta) else value


def _refuse_unreadable(file: Path, field: str) -> None:
    with file.open("rb") as stream:
        if stream.read(len(ENCRYPTED)) == ENCRYPTED:
            raise DataError(
                f"{field}: {file} has a password, or is in Excel's old format; save it as .xlsx without a password, or as CSV"
            )
    with zipfile.ZipFile(file) as packed:
        size = sum(each.file_size for each in packed.infolist())
    if size > LARGEST:
        raise DataError(
            f"{field}: {file} unpacks to {size / 1e9:.1f} GB, over {LARGEST / 1e9:g}; save the table as CSV"
        )
