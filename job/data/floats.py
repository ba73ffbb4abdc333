"""Restores integers in tables: pandas turns a column of integers into floats once one is missing, and 3 becomes 3.0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

LARGEST = 2**53
"""Floats represent every integer up to this one."""


@dataclass(frozen=True)
class Floats:
    """Properties of a float column: `whole` if all values are integers, `single` if they have 32 bits or fewer."""

    whole: bool
    single: bool = False

    def plain(self, value: Any) -> Any:
        """Returns a value of this column as people write it: 3 for 3.0, and 0.1 for the 0.10000000149 that 32 bits hold."""
        if not isinstance(value, float) or not math.isfinite(value):
            return value
        if self.whole:
            return int(value)
        return float(str(np.float32(value))) if self.single else value


def is_whole(value: float) -> bool:
    return not math.isfinite(value) or (value.is_integer() and abs(value) < LARGEST)


def floats_of(rows: Dataset) -> dict[str, Floats]:
    """Returns the floating-point columns."""
    import pyarrow
    from pyarrow import compute

    found = {}
    for name in rows.column_names:
        column = rows.data.column(name)
        if pyarrow.types.is_floating(column.type):
            values = column.cast(pyarrow.float64())
            values = values.filter(compute.is_finite(values))
            whole = compute.and_(
                compute.equal(values, compute.trunc(values)), compute.less(compute.abs(values), LARGEST)
            )
            found[name] = Floats(compute.all(whole, min_count=0).as_py(), column.type != pyarrow.float64())
    return found


def in_both(ours: Mapping[str, Floats], theirs: Mapping[str, Floats]) -> dict[str, Floats]:
    """Returns `ours`, with a column whole only if it is in `theirs` too, so that training and held-out rows are written alike."""
    return {
        name: Floats(each.whole and (name not in theirs or theirs[name].whole), each.single)
        for name, each in ours.items()
    }
