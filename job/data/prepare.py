"""From a source to rows that train and rows that are held out, every one of them looked at."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from job.data import Data
from job.data.images import AS_IT_IS, BadRow, Bounds, load
from job.data.look import Seen, look
from job.data.rows import as_text, fixed, last_answer, read_sample, repeat_images, require
from job.data.similar import near_pairs
from job.data.sources import Source, open_source
from job.data.split import hold_out, units
from job.errors import DataError
from job.spec import JobSpec

if TYPE_CHECKING:
    from datasets import Dataset

    from job.model.lengths import Ruler


BOTH = ("burned_in_yes", "burned_in_maybe", "over_length", "without_images")
"""Facts that are counts over rows to train on and rows held out by the user together."""


def prepare(
    spec: JobSpec,
    scratch: Path,
    measure: Ruler | None = None,
    most: int | None = None,
    bounds: Bounds = AS_IT_IS,
) -> Data:
    """Open, look at every row, set bad ones aside, split. `measure` counts a row's tokens. Raises DataError.

    Pictures are shrunk to `bounds`, or to `dataset.image_max_side` where that is a number.
    With `most`, only so many rows are looked at and handed on, and the facts say so.
    """
    dataset = spec.dataset
    if dataset.image_max_side != "auto":
        bounds = Bounds(side=dataset.image_max_side)
    source = open_source(dataset, dataset.path, dataset.split, scratch, bounds=bounds)
    _require_columns(source, spec)
    seen, bad, facts = look(source, spec, measure, most)
    facts["source"] = source.decided
    if dataset.eval_path or dataset.eval_split:
        named = "dataset.eval_path" if dataset.eval_path else "dataset.eval_split"
        split = dataset.eval_split or dataset.split
        other = open_source(dataset, dataset.eval_path or dataset.path, split, scratch, named, bounds)
        _require_columns(other, spec)
        held, bad_held, theirs = look(other, spec, measure, most)
        facts |= {name: facts[name] + theirs[name] for name in BOTH}
        facts["reasons"] = dict(Counter(facts["reasons"]) + Counter(theirs["reasons"]))
        bad = bad + [{**row, "of": "evaluation"} for row in bad_held]
        numbers = [group_numbers(side, dataset.group_column) for side in (seen, held)]
        facts["same_in_both"] = len(
            set.intersection(*({key for row in side for key in row.keys} for side in (seen, held)))
        )
    else:
        other = source
        seen, held, numbers = _split(seen, spec)
    if not seen:
        raise DataError("dataset: no rows are left to train on")
    near = _near(seen, held)
    train = _rows(source, seen, numbers[0], spec)
    evaluation = _spread(_rows(other, held, numbers[1], spec), spec.evaluation.max_rows)
    part = facts.get("looked_at", facts["rows"]) / facts["rows"]
    facts |= {"train": round(len(seen) / part), "evaluation": round(len(held) / part)}
    facts |= {"quarantined": len(bad), "near_duplicates": len(near)}
    facts["instruction"] = None if source.reading.messages or not fixed(dataset) else dataset.instruction
    if most is None:
        facts["train_sha256"] = hashlib.sha256("".join(row.digest for row in seen).encode()).hexdigest()
    facts["grouped"] = bool(dataset.group_column or source.table.patients)
    values = {
        name: label.values or sorted({row.labels[name] for row in seen + held} - {""})
        for name, label in spec.evaluation.labels.items()
    }
    return Data(train, evaluation, bad, facts, values, near)


def group_numbers(rows: Sequence[Seen], by_column: str | None) -> list[int]:
    """The group that each row belongs to: the column's value, or, without one, all rows that share a picture."""
    return units([row.keys[:1] if by_column else row.keys for row in rows])


def _split(rows: list[Seen], spec: JobSpec) -> tuple[list[Seen], list[Seen], list[list[int]]]:
    dataset = spec.dataset
    numbers = group_numbers(rows, dataset.group_column)
    names = [rows[number].keys[0] for number in numbers]
    strata = [row.stratum for row in rows] if dataset.stratify_column else None
    held = hold_out(names, dataset.eval_fraction, spec.training.seed, strata=strata, rows=dataset.eval_rows)
    sides = [[place for place, out in enumerate(held) if out is side] for side in (False, True)]
    train, evaluation = ([rows[place] for place in side] for side in sides)
    return train, evaluation, [[numbers[place] for place in side] for side in sides]


def _near(train: list[Seen], held: list[Seen]) -> list[dict[str, Any]]:
    """Held-out rows with a picture that is nearly one to train on; exact copies are among them where a group column or the
    user put them on both sides."""
    places = [[(row.place, bits) for row in side for bits in row.hashes] for side in (held, train)]
    if not all(places):
        return []
    ours, theirs = (np.stack([bits for _, bits in side]) for side in places)
    found = [(places[0][a][0], places[1][b][0], apart) for a, b, apart in near_pairs(ours, theirs)]
    return [{"evaluation": f"row-{a}", "train": f"row-{b}", "bits_apart": apart} for a, b, apart in found]


def _rows(source: Source, seen: list[Seen], numbers: list[int], spec: JobSpec) -> Dataset:
    """The rows chosen, by their places: not one is copied."""
    from datasets import Dataset

    chosen = Dataset.from_dict({"_row": [row.place for row in seen], "_unit": numbers})
    return chosen.with_transform(partial(_transform, spec=spec, source=source))


def _transform(batch: dict[str, list[int]], spec: JobSpec, source: Source) -> dict[str, list[Any]]:
    places, units = batch["_row"], batch["_unit"]
    at_once = len(places) if source.table.streamed else 1  # the rows of a batch wait for the store together
    with warnings.catch_warnings(), ThreadPoolExecutor(at_once) as pool:
        warnings.simplefilter("ignore")
        one = pool.map if source.table.streamed else map
        made = list(one(partial(_one, spec=spec, source=source), places, units, source.rows_at(places)))
    return {name: [row[name] for row in made] for name in made[0]}


def _one(place: int, unit: int, row: dict[str, Any], spec: JobSpec, source: Source) -> dict[str, Any]:
    dataset, evaluation = spec.dataset, spec.evaluation
    try:
        values = source.read(row)
        sample = read_sample(values, dataset, source.reading)
        images = [load(value, source.files, dataset, len(sample.images)) for value in sample.images]
    except BadRow as reason:
        raise DataError(
            f"{source.field}: row {place} was good before and is not now: {reason}; was the data changed?"
        ) from None
    messages = repeat_images(sample.messages, [len(each) for each in images])
    return {
        "id": f"row-{place}",
        "messages": messages,
        "images": [picture for each in images for picture in each],
        "reference": last_answer(messages),
        "labels": {name: as_text(values.get(label.column)) for name, label in evaluation.labels.items()},
        "groups": {column: as_text(values.get(column)) or None for column in evaluation.groups},
        "unit": unit,
        **({"weight": sample.weight} if dataset.weight_column else {}),
    }


def _require_columns(source: Source, spec: JobSpec) -> None:
    labels = {
        f"evaluation.labels.{name}.column is {label.column}": label.column
        for name, label in spec.evaluation.labels.items()
    }
    groups = {f"evaluation.groups has {column}": column for column in spec.evaluation.groups}
    require({**labels, **groups}, source.columns, source.field)


def _spread(rows: Dataset, most: int) -> Dataset:
    """At most `most` rows, evenly over all, always the same."""
    return rows if len(rows) <= most else rows.select([index * len(rows) // most for index in range(most)])
