"""Turns a source into training rows and held-out rows, and validates every one of them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from job.config.schema import JobSpec, uncertain_key
from job.data import Data, Row
from job.data.cells import as_text, labels_of
from job.data.conversations import fixed, last_answer, read_sample, repeat_images
from job.data.facts import DataFacts, NearPair
from job.data.floats import in_both
from job.data.images import AS_IT_IS, Bounds, file_name, load
from job.data.near_duplicates import near_pairs
from job.data.pixels import BadRow
from job.data.sources import Source, open_source
from job.data.split import first_alike, hold_out, units
from job.data.validate import ValidatedRow, validate_rows
from job.errors import DataError
from job.output.identity import Identity

if TYPE_CHECKING:
    from datasets import Dataset

    from job.model.token_length import TokenCounter

T = TypeVar("T")


def prepare(
    spec: JobSpec,
    scratch: Path,
    measure: TokenCounter | None = None,
    most: int | None = None,
    bounds: Bounds = AS_IT_IS,
) -> Data:
    """Opens the source, validates every row, quarantines bad ones and splits the rest. `measure` counts a row's tokens. Raises
    DataError.

    Images are shrunk to `bounds`, or to `dataset.image_max_side` if it is a number. With `most`, only that many rows are
    validated and returned, and the facts say so.
    """
    dataset = spec.dataset
    if dataset.image_max_side != "auto":
        bounds = Bounds(side=dataset.image_max_side)
    source, other = _open_both(spec, scratch, bounds)
    seen, bad, counts = validate_rows(source, spec, measure, most)
    whole, shared = counts.looked_at is None, None
    shares = [(counts.looked_at or counts.rows) / max(counts.rows, 1)] * 2
    if other is not source:
        held, bad_held, theirs = validate_rows(other, spec, measure, most)
        whole = whole and theirs.looked_at is None
        shares[1] = (theirs.looked_at or theirs.rows) / max(theirs.rows, 1)
        counts = counts.with_held_out(theirs)
        bad = bad + [replace(row, of="evaluation") for row in bad_held]
        numbers = [group_numbers(side, dataset.group_column) for side in (seen, held)]
        shared = set.intersection(*({key for row in side for key in row.compared} for side in (seen, held)))
    else:
        seen, held, numbers = _split(seen, spec)
    if not seen:
        raise DataError("dataset: no rows are left to train on")
    near = _near(seen, held)
    leaks = {pair.train for pair in near} | _sharing(seen, shared)
    aside = (
        _set_aside(seen, numbers[0], leaks, spec, shares[0]) if spec.evaluation.chooses_step else [False] * len(seen)
    )
    (seen, validation), (ours, apart) = _sides(seen, aside), _sides(numbers[0], aside)
    grouped = bool(dataset.group_column or source.table.patients)
    together = [*seen, *validation, *held]
    alike, pair = first_alike(row.compared[0] for row in together) if grouped else (0, None)
    evaluation = _spread(_rows(other, held, numbers[1], spec), spec.evaluation.max_rows)
    facts = DataFacts(
        **vars(counts),
        source=source.decided,
        left_out=source.table.left_out,
        held_out_source=None if other is source else other.decided,
        same_in_both=None if shared is None else len(shared),
        train=round(len(seen) / shares[0]),
        evaluation=round(len(held) / shares[1]),
        validation=round(len(validation) / shares[0]) if spec.evaluation.chooses_step else None,
        validation_groups=round(len(set(apart)) / shares[0]) if spec.evaluation.chooses_step else None,
        quarantined=len(bad),
        near_duplicates=len(near),
        instruction=None if source.reading.messages or not fixed(dataset) else dataset.instruction,
        train_sha256=hashlib.sha256("".join(row.digest for row in seen).encode()).hexdigest() if most is None else None,
        grouped=grouped,
        alike_groups=alike,
        alike_rows=pair and (together[pair[0]].place, together[pair[1]].place),
    )
    values = {name: label.values or _known(together, name) for name, label in spec.evaluation.labels.items()}
    identity = _identity(seen, held, validation) if whole else None
    leaked = {pair.evaluation for pair in near} | _sharing(held, shared)
    train, chosen_on = _rows(source, seen, ours, spec), _rows(source, validation, apart, spec)
    sources = {each.field: each for each in (source, other)}
    return Data(train, evaluation, chosen_on, bad, facts, values, near, identity, sources, leaked)


def _identity(*sides: Sequence[ValidatedRow]) -> Identity:
    return Identity(*(b"".join(row.identity for row in side) for side in sides))


def _sharing(rows: Sequence[ValidatedRow], keys: set[str] | None) -> set[str]:
    return {row.id for row in rows if keys and keys.intersection(row.compared)}


def _known(rows: Sequence[ValidatedRow], name: str) -> list[str]:
    return sorted({value for row in rows for value in _values(row, name)} - {""})


def _values(row: ValidatedRow, name: str) -> list[str]:
    parts = (row.labels.get(name, ""), row.labels.get(uncertain_key(name), ""))
    return [value for part in parts for value in (part if isinstance(part, list) else [part])]


def _open_both(spec: JobSpec, scratch: Path, bounds: Bounds) -> tuple[Source, Source]:
    """Opens training rows and the user's held-out rows; returns the same source twice if the user holds none out."""
    dataset = spec.dataset
    labels = spec.evaluation.labels.items()
    also = {f"evaluation.labels.{name}.column is {label.column}": label.column for name, label in labels}
    also |= {
        f"evaluation.labels.{name}.uncertain_column is {label.uncertain_column}": label.uncertain_column
        for name, label in labels
        if label.uncertain_column
    }
    also |= {f"evaluation.groups has {column}": column for column in spec.evaluation.groups}
    source = open_source(dataset, dataset.path, dataset.split, scratch, bounds=bounds, also=also, privacy=spec.privacy)
    if not (dataset.eval_path or dataset.eval_split):
        return source, source
    named = "dataset.eval_path" if dataset.eval_path else "dataset.eval_split"
    split = dataset.eval_split or dataset.split
    other = open_source(dataset, dataset.eval_path or dataset.path, split, scratch, named, bounds, also, spec.privacy)
    ours, theirs = source.floats, other.floats
    return replace(source, floats=in_both(ours, theirs)), replace(other, floats=in_both(theirs, ours))


def group_numbers(rows: Sequence[ValidatedRow], by_column: str | None) -> list[int]:
    """Returns the group of each row: by the column's value or, without a column, by shared images."""
    return units([row.compared[:1] if by_column else row.compared for row in rows])


def _split(rows: list[ValidatedRow], spec: JobSpec) -> tuple[list[ValidatedRow], list[ValidatedRow], list[list[int]]]:
    dataset = spec.dataset
    numbers = group_numbers(rows, dataset.group_column)
    names = [rows[number].keys[0] for number in numbers]
    strata = [row.stratum for row in rows] if dataset.stratify_column else None
    held = hold_out(names, dataset.eval_fraction, spec.training.seed, strata=strata, rows=dataset.eval_rows)
    return *_sides(rows, held), [*_sides(numbers, held)]


def _set_aside(
    rows: Sequence[ValidatedRow], numbers: Sequence[int], leaks: set[str], spec: JobSpec, part: float
) -> list[bool]:
    """Returns for each training row whether it becomes a validation row: whole groups, by the same hash as held-out rows, until
    they are a tenth of the rows or `evaluation.eval_loss_rows`.

    A group with rows in `leaks`, which held-out rows share, stays in training: the final measurement leaves those held-out rows
    out. `part` is the share of the rows that were looked at. Raises DataError if fewer than two groups are left to choose from.
    """
    unfit = {number for row, number in zip(rows, numbers, strict=True) if row.id in leaks}
    places = [place for place, number in enumerate(numbers) if number not in unfit]
    first = dict(zip(reversed(numbers), reversed(rows), strict=True))
    names = [first[numbers[place]].keys[0] for place in places]
    if len(set(names)) < 2:
        raise DataError(
            "evaluation: take: best and patience choose the step on rows that are neither trained on nor held out, and no group "
            f"(patient) can be set aside for that: {len(set(numbers))} are in the training rows, {len(unfit)} of them in the "
            "held-out rows too; add patients, or set take to last and remove patience"
        )
    most = max(1, round(part * min(spec.evaluation.eval_loss_rows, len(rows) / part // 10)))
    strata = [rows[place].stratum for place in places] if spec.dataset.stratify_column else None
    chosen = hold_out(names, 0, spec.training.seed, strata=strata, rows=most)
    aside = {place for place, out in zip(places, chosen, strict=True) if out}
    return [place in aside for place in range(len(rows))]


def _sides(values: Sequence[T], out: Sequence[bool]) -> tuple[list[T], list[T]]:
    """Splits values into those that stay and those that are `out`."""
    stay, go = ([value for value, is_out in zip(values, out, strict=True) if is_out is side] for side in (False, True))
    return stay, go


def _near(train: list[ValidatedRow], held: list[ValidatedRow]) -> list[NearPair]:
    """Finds held-out rows with a near-duplicate of a training image. Exact copies are included if a group column or the user put
    them on both sides."""
    places = [[row.place for row in side for _ in row.thumbnails] for side in (held, train)]
    if not all(places):
        return []
    ours, theirs = (np.stack([each for row in side for each in row.thumbnails]) for side in (held, train))
    return [NearPair(f"row-{places[0][a]}", f"row-{places[1][b]}", alike) for a, b, alike in near_pairs(ours, theirs)]


def _rows(source: Source, seen: list[ValidatedRow], numbers: list[int], spec: JobSpec) -> Dataset:
    """Selects rows by index, without copying any."""
    from datasets import Dataset

    chosen = Dataset.from_dict({"_row": [row.place for row in seen], "_unit": numbers})
    return chosen.with_transform(partial(_transform, spec=spec, source=source))


def _transform(batch: dict[str, list[int]], spec: JobSpec, source: Source) -> dict[str, list[Any]]:
    places, units = batch["_row"], batch["_unit"]
    at_once = len(places) if source.table.streamed else 1  # the rows of a batch wait for the store concurrently
    with warnings.catch_warnings(), ThreadPoolExecutor(at_once) as pool:
        warnings.simplefilter("ignore")
        one = pool.map if source.table.streamed else map
        read = partial(_one, spec=spec, source=source)
        made: list[Mapping[str, Any]] = list(one(read, places, units, source.rows_at(places)))
    return {name: [row[name] for row in made] for name in made[0]}


def _one(place: int, unit: int, row: dict[str, Any], spec: JobSpec, source: Source) -> Row:
    dataset, evaluation = spec.dataset, spec.evaluation
    try:
        values = source.read(row)
        sample = read_sample(values, dataset, source.reading)
        images = [load(value, source.files, dataset, len(sample.images)) for value in sample.images]
    except BadRow as reason:
        raise DataError(
            f"{source.field}: row {place} was valid before and is not now: {reason}; did the data change?"
        ) from None
    messages = repeat_images(sample.messages, [len(each) for each in images], dataset.dicom.frames)
    made: Row = {
        "id": f"row-{place}",
        "messages": messages,
        "images": [picture for each in images for picture in each],
        "reference": last_answer(messages),
        "source": ", ".join(filter(None, map(file_name, sample.images))) or None,
        "labels": labels_of(values, evaluation.labels),
        "groups": {column: as_text(values.get(column)) or None for column in evaluation.groups},
        "unit": unit,
    }
    return {**made, "weight": sample.weight} if dataset.weight_column else made


def _spread(rows: Dataset, most: int) -> Dataset:
    """Returns at most `most` rows, evenly spread and always the same."""
    return rows if len(rows) <= most else rows.select([index * len(rows) // most for index in range(most)])
