"""Defines what is known of the data: counts, quarantined rows and near-duplicates, and their JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True)
class QuarantinedRow:
    """A row that cannot be used: its index and why, never its content. `of` says that it is one of the user's held-out rows."""

    row: int
    reason: str
    of: Literal["evaluation"] | None = None


@dataclass(frozen=True)
class NearPair:
    """A held-out row and a training row with near-duplicate images, by their ids. `likeness` is 1 for the same image (see
    `job.data.near_duplicates`)."""

    evaluation: str
    train: str
    likeness: float


@dataclass(frozen=True)
class TokenFacts:
    """Tokens of a row; `learned` is the largest number whose loss is taken."""

    median: int
    longest: int
    learned: int = 0


@dataclass(frozen=True)
class ImageFacts:
    """Images and their sizes (width, height), ordered by area. `most` is the largest number in a row."""

    count: int
    smallest: tuple[int, int]
    median: tuple[int, int]
    largest: tuple[int, int]
    most: int


@dataclass(frozen=True)
class ShrunkFacts:
    """Images that are shrunk before the model's processor sees them. The sizes (width, height) are those of the one of median
    area, and the tokens those of its row; None if they were not counted."""

    count: int
    whole: tuple[int, int]
    shrunk: tuple[int, int]
    whole_tokens: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class SplitFacts:
    """Counts of the rows of one source. `tokens` and `images` are None if none were counted, `looked_at` if every row was."""

    rows: int
    other_splits: dict[str, int] = field(default_factory=dict)
    """Rows whose own split column names another split, by that split."""
    split_column: str | None = None
    decoders: int = 0
    """Processes that decode DICOM."""
    burned_in_yes: int = 0
    burned_in_maybe: int = 0
    burned_in_masked: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Quarantined rows by reason, the most frequent first."""
    without_images: int = 0
    over_length: int = 0
    lossy: int = 0
    """Rows with U+FFFD in their texts."""
    absolute: int = 0
    """Rows that name an image by an absolute path."""
    blank: int = 0
    """Rows with an image of one colour throughout."""
    default_window: int = 0
    """Rows with a CT image that has no window."""
    filtered: int = 0
    """Rows left out by `dataset.filter` and `dataset.dropna`, which are counted nowhere else."""
    tokens: TokenFacts | None = None
    images: ImageFacts | None = None
    shrunk: ShrunkFacts | None = None
    looked_at: int | None = None

    def with_held_out(self, theirs: SplitFacts) -> SplitFacts:
        """Adds the user's held-out rows to the counts of `BOTH` and to the reasons."""
        added = {name: getattr(self, name) + getattr(theirs, name) for name in BOTH}
        if not self.looked_at and theirs.looked_at:
            added["looked_at"] = self.rows
        return replace(self, **added, reasons=dict(Counter(self.reasons) + Counter(theirs.reasons)))


@dataclass(frozen=True, kw_only=True)
class DataFacts(SplitFacts):
    """Counts of all sides of the split; `train`, `evaluation` and `validation` are estimates if `looked_at` is not None.
    `held_out_source` and `same_in_both` (groups or images in training and held-out rows) are None if the job itself holds rows
    out; `train_sha256` if not every row was to be validated."""

    source: str
    """Where the rows are and which columns are read, in words."""
    left_out: tuple[str, ...] = ()
    """Tables named after other splits."""
    held_out_source: str | None = None
    same_in_both: int | None = None
    train: int
    evaluation: int
    validation: int | None = None
    """Rows that choose the step, set aside from training rows; None if nothing is chosen."""
    validation_groups: int | None = None
    """Groups (patients) of these rows, or images."""
    quarantined: int = 0
    near_duplicates: int = 0
    instruction: str | None = None
    """The instruction that all rows share, if they do."""
    train_sha256: str | None = None
    grouped: bool = False
    alike_groups: int = 0
    """Groups (patients) that equal another one but for leading zeros or a `.0`."""
    alike_rows: tuple[int, int] | None = None
    """The first two rows of such groups."""


BOTH = (
    "burned_in_yes",
    "burned_in_maybe",
    "burned_in_masked",
    "over_length",
    "without_images",
    "lossy",
    "absolute",
    "blank",
    "default_window",
    "filtered",
)
"""Facts that count training rows and the user's held-out rows together."""
NULLS = ("split_column", "instruction")
"""Keys that are null in JSON if they are None. Others are left out."""


def as_json(found: SplitFacts | QuarantinedRow | NearPair) -> dict[str, Any]:
    """Returns what a report or a file of `data/` holds. Order and names of fields are those of the JSON."""
    return {name: value for name, value in asdict(found).items() if value is not None or name in NULLS}


def as_jsonl(found: Iterable[QuarantinedRow | NearPair]) -> bytes:
    return "".join(f"{json.dumps(as_json(each))}\n" for each in found).encode()
