"""Reads cells of a table: text, several values, labels, images, and templates over columns."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from job.config.schema import FIELD, LabelSpec, uncertain_key
from job.data.pixels import BadRow

HALF = re.compile("[\\ud800-\\udfff]")
"""Half a character, such as an emoji cut in two: JSON can hold it, but no tokenizer accepts it."""


def as_text(value: Any) -> str:
    """Returns a column's value as text without surrounding blanks: patient "7 " is "7". List items are joined by commas. NaN,
    which pandas writes for a missing value, becomes empty."""
    if isinstance(value, list):
        return ", ".join(filter(None, map(as_text, value)))
    if value is None or value != value or (isinstance(value, float) and math.isinf(value)):
        return ""
    return HALF.sub("?", str(value).strip())


def several(value: Any, separator: str | None) -> list[str] | None:
    """Returns the values of a cell that may hold several: a list (some tables write it as JSON or as Python does), or text with a
    separator. None if it is neither, or empty text."""
    if isinstance(value, str) and value[:1] == "[":
        read = from_json(value) or from_python(value)
        value = read if isinstance(read, list) else value
    if isinstance(value, list):
        return [text for each in value if (text := as_text(each))]
    text = as_text(value)
    return [part for each in text.split(separator) if (part := each.strip())] if separator and text else None


def labels_of(values: Mapping[str, Any], labels: Mapping[str, LabelSpec]) -> dict[str, str | list[str]]:
    """Returns the true labels of a row, by name. Those of which it may have several are lists. Raises BadRow for single text
    beside an `uncertain_column`."""
    found: dict[str, str | list[str]] = {}
    for name, label in labels.items():
        value = values.get(label.column)
        parts = None if label.pattern else several(value, label.separator)
        found[name] = as_text(value) if parts is None else parts
        if parts is None and label.uncertain_column and found[name]:
            raise BadRow(
                f"column {label.column} holds text and no list; say in evaluation.labels.{name}.separator what separates its "
                "values, or remove uncertain_column"
            )
        if parts is not None and label.uncertain_column:
            found[uncertain_key(name)] = several(values.get(label.uncertain_column), label.separator) or []
    return found


def fill(template: str, row: dict[str, Any]) -> str:
    """Fills columns into the template. Omits a line whose fields are all empty in this row: not every patient has a history."""
    lines = []
    for line in template.split("\n"):
        names = FIELD.findall(line)
        values = {name: as_text(row.get(name)) for name in names}
        if not names or any(values.values()):
            filled = FIELD.sub(lambda found, values=values: values[found[1]], line)  # type: ignore[misc]
            lines.append(filled.replace("{{", "{").replace("}}", "}"))
    return "\n".join(lines).strip()


def images_of(row: dict[str, Any], column: str) -> list[Any]:
    """Returns the images of a column or, for a template, one for each value of its columns: none if one is empty."""
    names = FIELD.findall(column)
    if not names:
        return _values(row.get(column))
    values = {name: _values(row.get(name)) for name in names}
    count = max(map(len, values.values())) if all(values.values()) else 0
    if count and any(len(each) not in (1, count) for each in values.values()):
        raise BadRow(f"{', '.join(names)} have different numbers of values")
    each = ({name: several[n % len(several)] for name, several in values.items()} for n in range(count))
    return [fill(column, one) for one in each]


def _values(value: Any) -> list[Any]:
    """Returns the images of one column: one, a list (some tables write it as JSON or as Python does), or none."""
    if (
        isinstance(value, str)
        and value[:1] == "["
        and isinstance(several := from_json(value) or from_python(value), list)
    ):
        value = several
    if isinstance(value, dict) and value.get("bytes") is None and not value.get("path") and "montage" not in value:
        return []
    if isinstance(value, list):
        return [image for image in value if image is not None]
    return [] if value is None or value == "" else [value]


def from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def from_python(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
