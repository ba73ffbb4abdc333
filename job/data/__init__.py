"""Defines validated, split rows of images and text, served as conversations.

Imports nothing that `prepare` needs: code that wants only the types, or finds the job already published, loads no libraries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from job.data.facts import DataFacts, NearPair, QuarantinedRow
from job.errors import DataError
from job.output.identity import Identity

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

    from job.data.images import Bounds
    from job.data.sources import Source


class BadRows(DataError):
    """Raised when more rows are bad than the spec allows; `rows` lists them."""

    def __init__(self, message: str, rows: list[QuarantinedRow]) -> None:
        super().__init__(message)
        self.rows = rows


class Row(TypedDict):
    """A row as training and evaluation take it. `messages` is a conversation, `reference` its last answer, `source` the names of
    its image files; `unit` numbers the group (patient, or image) that the row belongs to; `weight` multiplies its loss, if the
    spec has a column for it."""

    id: str
    messages: list[dict[str, Any]]
    images: list[Image]
    reference: str
    source: NotRequired[str | None]
    labels: dict[str, str | list[str]]
    groups: dict[str, str | None]
    unit: int
    weight: NotRequired[float]


@dataclass(frozen=True)
class Data:
    """`train`, `evaluation` and `validation` lazily yield rows as in `Row`. No group has rows in `validation` and in one of the
    others; it is empty unless losses choose the step.

    `near` holds pairs of near-duplicate images across the split. `label_values` holds the values of each label's column.
    """

    train: Dataset
    evaluation: Dataset
    validation: Dataset
    quarantined: list[QuarantinedRow]
    facts: DataFacts
    label_values: dict[str, list[str]] = field(default_factory=dict)
    near: list[NearPair] = field(default_factory=list)
    identity: Identity | None = None
    """None if not every row was validated."""
    sources: dict[str, Source] = field(default_factory=dict)
    """What the rows were read from, keyed by the spec field that names it."""
    leaked: set[str] = field(default_factory=set)
    """Ids of held-out rows that share a group or an image with training rows, or nearly an image."""

    @property
    def bounds(self) -> Bounds:
        """What images are shrunk to."""
        return self.sources["dataset.path"].files.bounds
