"""Decodes text files strictly, row by row. A row that is not UTF-8 is bad; U+FFFD is a character like any other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RAW = re.compile("[\udc80-\udcff]")
"""What `ESCAPE` makes of a byte that is not UTF-8. Valid text never holds it."""
ESCAPE = "surrogateescape"
NOT_UTF8 = "not UTF-8"
"""Replaces a line that holds such a byte in a table."""


def encoding_of(file: Path) -> str:
    """Detects UTF-8, 16 or 32 from the file's first bytes, with or without a BOM."""
    with file.open("rb") as raw:
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
