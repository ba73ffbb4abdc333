"""Decides whether too many rows are bad to go on, and says what to do about them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from job.config.schema import JobSpec
from job.data import BadRows
from job.data.facts import QuarantinedRow
from job.data.image_names import MISSING, OUTSIDE, packed
from job.errors import DataError
from job.runtime.status import on_terminal

if TYPE_CHECKING:
    from job.data.sources import Source
    from job.data.validate import ValidatedRow

MAX_REASONS = 3


def refuse_unusable(
    source: Source, spec: JobSpec, good: list[ValidatedRow], bad: list[QuarantinedRow], burned: list[int], total: int
) -> None:
    """Raises BadRows if too many of the `total` rows are bad or burned-in text is refused; DataError if rows that should have
    images have none, or if rows are too long and the spec refuses those. `burned` holds the indices of rows with burned-in
    text."""
    dataset, most = spec.dataset, spec.training.max_length
    if burned and spec.privacy.burned_in == "refuse":
        raise BadRows(
            f"{source.field}: {len(burned)} of {total} rows have images with burned-in text (first: row "
            f"{min(burned)}), which privacy.burned_in refuses; remove them, or set it to quarantine or mask",
            bad,
        )
    blind = dataset.image_column is not None and not any(row.sizes for row in good)
    if len(bad) > dataset.max_bad_fraction * total or not good:
        hint = f". {_where_pictures_are(source)}" if blind and not source.reading.images else ""
        hint += f". {_first_missing(source, bad)}"
        hint = hint.rstrip(". ")
        raise BadRows(_too_many(source.field, bad, total, dataset.max_bad_fraction) + hint, bad)
    if blind:
        raise DataError(
            f"{source.field}: none of {total} rows has an image ({source.decided}). {_where_pictures_are(source)}"
        )
    over = [row.tokens for row in good if row.tokens > most]
    if over and dataset.over_length == "fail":
        raise DataError(
            f"{source.field}: {len(over)} of {len(good)} rows have more than training.max_length {most} tokens (the longest "
            f"{max(over)}); raise it, set dataset.image_max_side, or set dataset.over_length to drop or truncate"
        )


def _where_pictures_are(source: Source) -> str:
    """Suggests what to do about rows without images."""
    columns = source.other_pictures()
    named = f"Column {', '.join(columns)} looks like images: set" if columns else "Set"
    return f"{named} dataset.image_column to the column that holds them, or to null to train on text alone"


def _first_missing(source: Source, bad: list[QuarantinedRow]) -> str:
    """Names the first path without a file, on a terminal alone, since names of files may hold the names of patients; and kinds of
    archives beside the table."""
    missing = next((row.row for row in bad if row.reason in (MISSING, OUTSIDE)), None)
    if missing is None:
        return ""
    tried = source.tried(missing) if on_terminal() else "On a terminal, job check names the first path that was tried"
    hint = packed(source.files.base) if isinstance(source.files.base, Path) else ""
    return ". ".join(filter(None, [hint, tried]))


def _too_many(field: str, bad: list[QuarantinedRow], total: int, allowed: float) -> str:
    reasons = Counter(row.reason for row in bad).most_common(MAX_REASONS)
    first = {row.reason: row.row for row in reversed(bad)}
    listed = "; ".join(f"{count} × {reason} (first: row {first[reason]})" for reason, count in reasons)
    return (
        f"{field}: {len(bad)} of {total} rows are bad, over max_bad_fraction {allowed:g}: {listed}. "
        "Fix them, or raise dataset.max_bad_fraction"
    )
