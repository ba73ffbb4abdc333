"""Decodes columns whose numbers stand for names (ClassLabel of `datasets`), as scalars, in lists and in structs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from job.data.pixels import BadRow
from job.errors import DataError

if TYPE_CHECKING:
    from pyarrow import Schema

Kind = Any
"""The type of a value, as `datasets.Features.to_dict` writes it: `{"_type": "ClassLabel", "names": […]}`, or lists and mappings
of kinds."""


def kinds_of(schema: Schema) -> dict[str, Kind]:
    """Returns the kinds of class columns, which `datasets` records beside a table's own types. Empty for a table written by
    another program."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return with_classes(noted) if isinstance(noted, dict) else {}


def with_classes(kinds: dict[str, Kind]) -> dict[str, Kind]:
    """Returns only the kinds of columns that hold classes."""
    return {name: kind for name, kind in kinds.items() if _has_classes(kind)}


def agreed(of_files: Iterable[tuple[str, dict[str, Kind]]], field: str) -> dict[str, Kind]:
    """Merges the class columns of several files. Raises DataError if two files number the classes of a column differently."""
    found: dict[str, tuple[str, Kind]] = {}
    for file, kinds in of_files:
        for column, kind in kinds.items():
            first, other = found.setdefault(column, (file, kind))
            if kind != other:
                raise DataError(
                    f"{field}: column {column} has different class names in {file} and {first}; use the same in both"
                )
    return {column: kind for column, (_, kind) in found.items()}


def named(value: Any, kind: Kind, column: str) -> Any:
    """Replaces numbers with class names. A value without a class (null or -1) becomes None; a list of classes becomes names
    separated by commas. Raises BadRow for a number without a name."""
    if _is_class(kind) and not isinstance(value, list):
        return _name(value, kind["names"], column)
    if isinstance(value, list):
        inner = kind[0] if isinstance(kind, list) else kind.get("feature", kind)
        each = [named(one, inner, column) for one in value]
        return ", ".join(filter(None, each)) if _is_class(inner) else each
    if isinstance(value, dict):
        inner = kind.get("feature", kind)  # a sequence of mappings is stored as a mapping of lists
        return {
            name: named(one, inner[name], column) if _has_classes(inner.get(name)) else one
            for name, one in value.items()
        }
    return value


def _name(value: Any, names: list[str], column: str) -> str | None:
    if value is None or value != value or value in names:
        return value if isinstance(value, str) else None
    try:
        number = int(value)
    except (ValueError, TypeError):
        number = len(names)
    if number == -1:
        return None
    if not 0 <= number < len(names) or (isinstance(value, float) and number != value):
        raise BadRow(f"{column} is none of its {len(names)} classes")
    return names[number]


def _is_class(kind: Kind) -> bool:
    return isinstance(kind, dict) and kind.get("_type") == "ClassLabel" and isinstance(kind.get("names"), list)


def _has_classes(kind: Kind) -> bool:
    if isinstance(kind, list):
        return any(map(_has_classes, kind))
    return isinstance(kind, dict) and (_is_class(kind) or any(map(_has_classes, kind.values())))
