"""Rows of images and text, looked at once, split, and handed on as conversations.

Light: whoever only needs the type, or finds that a job is published already, loads none of the libraries of `prepare`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from job.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


QUARANTINE_KEY = "data/quarantine.jsonl"
NEAR_KEY = "data/near_duplicates.jsonl"


class BadRows(DataError):
    """More rows are bad than the spec allows; `rows` are they, `{"row", "reason"}`."""

    def __init__(self, message: str, rows: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.rows = rows


@dataclass(frozen=True)
class Data:
    """`train` and `evaluation` yield `{"id", "messages", "images", "reference", "labels", "groups", "unit"}` lazily, and
    `weight` where the spec has a column for it.

    `unit` numbers the group (patient, or picture) that a row belongs to.

    `quarantined` holds `{"row", "reason"}`, never content; `near` the pairs of nearly the same pictures across the split.
    `label_values` are the values that each label's column has.
    """

    train: Dataset
    evaluation: Dataset
    quarantined: list[dict[str, Any]]
    facts: dict[str, Any]
    label_values: dict[str, list[str]] = field(default_factory=dict)
    near: list[dict[str, Any]] = field(default_factory=list)


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()
