"""Leaves out the rows that `dataset.filter` and `dataset.dropna` do not ask for."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from job.config.schema import DatasetSpec
from job.data.cells import as_text
from job.errors import DataError

if TYPE_CHECKING:
    from job.data.sources import Source


def filtered(source: Source, spec: DatasetSpec) -> Source:
    """Returns the source with the rows that pass. Rows that cannot be read stay, and are bad. Raises DataError if none is left,
    which quotes no value: a column may hold patients."""
    tests = [
        *((column, _lower(values)) for column, values in spec.filter.items()),
        *((column, None) for column in spec.dropna),
    ]
    if not tests:
        return source
    total, kept, passed = len(source.table.rows), list[int](), Counter[int]()
    for place, cells in enumerate(source.cells_of([column for column, _ in tests])):
        passes = [cells is None or _passes(cells[column], values) for column, values in tests]
        passed.update(number for number, passing in enumerate(passes) if passing)
        kept += [place] if all(passes) else []
    fields = [f"dataset.{'dropna' if values is None else 'filter'} by column {column}" for column, values in tests]
    if not kept:
        counts = ", ".join(f"{passed[number]} pass {field}" for number, field in enumerate(fields))
        raise DataError(f"{source.field}: none of {total} rows is left: {counts}; correct the values, or remove one")
    left_out = total - len(kept)
    why = f"{source.table.why}; {left_out} of {total} rows left out by {', '.join(fields)}"
    return source.selected(kept, why, filtered=left_out)


def _lower(values: Any) -> set[str]:
    return {as_text(value).lower() for value in (values if isinstance(values, list) else [values])}


def _passes(cell: list[str], values: set[str] | None) -> bool:
    """Whether one of the texts in a cell is among `values`; without these, whether one is not empty."""
    return any(cell) if values is None else not values.isdisjoint(_lower(cell))
