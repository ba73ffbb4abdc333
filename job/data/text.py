"""Decodes text files strictly, row by row. A row that is not UTF-8 is bad; U+FFFD is a character like any other."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any, TextIO, cast

RAW = re.compile("[\udc80-\udcff]")
"""What `ESCAPE` makes of a byte that is not UTF-8. Valid text never holds it."""
ESCAPE = "surrogateescape"
NOT_UTF8 = "not UTF-8"
"""Replaces a line that holds such a byte in a table."""


def ending_of(file: Path) -> str:
    """Returns the ending of a file's name in lower case, without `.gz`: `.csv` for `labels.CSV.gz`."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def open_text(file: Path, encoding: str, newline: str | None = None) -> TextIO:
    """Opens a text, unpacking it if its name ends with `.gz`. Bytes that are not text become `RAW`."""
    opened = gzip.open if file.suffix.lower() == ".gz" else open
    return cast(TextIO, opened(file, "rt", encoding=encoding, errors=ESCAPE, newline=newline))


def encoding_of(file: Path) -> str:
    """Detects UTF-8, 16 or 32 from the text's first bytes, with or without a BOM."""
    with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as raw:
        found = json.detect_encoding(raw.read(4))
    return "utf-8-sig" if found == "utf-8" else found


def as_line(row: Any) -> str:
    """Returns a row as a line of JSON, or `NOT_UTF8` if it was decoded with `ESCAPE` from bytes that are not UTF-8."""
    line = json.dumps(row)
    return NOT_UTF8 if "\\udc" in line and RAW.search(json.dumps(row, ensure_ascii=False)) else line


def checked(line: str) -> str:
    """Returns a line decoded with `ESCAPE`, or `NOT_UTF8` in its place."""
    return NOT_UTF8 if not line.isascii() and RAW.search(line) else line


def decoded(data: bytes) -> str:
    return data.decode("utf-8-sig", ESCAPE)
