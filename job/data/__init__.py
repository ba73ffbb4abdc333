"""Rows of image and text, looked at once, split, and handed on as conversations."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.data.images import BadRow, decode, image_bytes
from job.data.sources import Source, open_source
from job.data.split import hold_out
from job.errors import DataError
from job.spec import DatasetSpec, JobSpec

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("job")

MAX_REASONS = 3


@dataclass(frozen=True)
class Data:
    """`train` and `evaluation` yield `{"id", "messages", "images", "reference", "labels", "groups", "unit"}` lazily.

    `unit` numbers the group (patient, or picture) that a row belongs to.

    `quarantined` holds `{"row", "reason"}`, never content. `label_values` are the values that each label's column has.
    """

    train: Dataset
    evaluation: Dataset
    quarantined: list[dict[str, Any]]
    facts: dict[str, Any]
    label_values: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Looked:
    """What one pass over a source found."""

    good: list[int]
    keys: list[str]
    bad: list[dict[str, Any]]


def prepare(spec: JobSpec, scratch: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Data:
    """Open, look at every row, set bad ones aside, split. Raises DataError."""
    dataset = spec.dataset
    source = open_source(dataset, dataset.path, dataset.split, scratch)
    _require_columns(source, spec)
    looked = look(source, dataset, progress)
    facts: dict[str, Any] = {"source": source.decided, "rows": len(source.rows), "quarantined": len(looked.bad)}
    if dataset.eval_path or dataset.eval_split:
        field = "dataset.eval_path" if dataset.eval_path else "dataset.eval_split"
        split = dataset.eval_split or dataset.split
        other = open_source(dataset, dataset.eval_path or dataset.path, split, scratch, field)
        _require_columns(other, spec)
        other_looked = look(other, dataset, progress)
        train, evaluation = _rows(source, looked, spec), _rows(other, other_looked, spec)
        bad = looked.bad + [{**row, "of": "evaluation"} for row in other_looked.bad]
        facts["same_in_both"] = len(set(looked.keys) & set(other_looked.keys))
    else:
        held = hold_out(looked.keys, dataset.eval_fraction, spec.training.seed)
        train, evaluation = (
            _rows(source, _where(looked, held, False), spec),
            _rows(source, _where(looked, held, True), spec),
        )
        bad = looked.bad
    if not len(train):
        raise DataError("dataset: no rows are left to train on")
    facts |= {"train": len(train), "evaluation": len(evaluation)}
    return Data(train, _spread(evaluation, spec.evaluation.max_rows), bad, facts, _label_values(source, spec))


def look(source: Source, spec: DatasetSpec, progress: Callable[[int, int], None]) -> Looked:
    """Decode every image and read every answer once. Raises DataError when too many rows are bad.

    `keys` group the good rows for the split: the group column's value, else a digest of the image, so that the same
    picture is never on both sides.
    """
    good, keys, bad = list[int](), list[str](), list[dict[str, Any]]()
    total = len(source.rows) if spec.max_rows is None else min(spec.max_rows, len(source.rows))
    for index in range(total):
        row = source.rows[index]
        try:
            data = image_bytes(row[source.image_column], source.base)
            decode(data, max_pixels=spec.max_image_pixels, max_side=spec.image_max_side)
            _texts(row, spec)
            group = row[spec.group_column] if spec.group_column else hashlib.sha256(data).hexdigest()
            if group is None:
                raise BadRow(f"no {spec.group_column}")
            good.append(index)
            keys.append(str(group))
        except BadRow as reason:
            bad.append({"row": index, "reason": str(reason)})
        progress(index + 1, total)
    if len(bad) > spec.max_bad_fraction * total or not good:
        raise DataError(_too_many(bad, total, spec.max_bad_fraction))
    return Looked(good, keys, bad)


def _too_many(bad: list[dict[str, Any]], total: int, allowed: float) -> str:
    reasons = Counter(row["reason"] for row in bad).most_common(MAX_REASONS)
    first = {row["reason"]: row["row"] for row in reversed(bad)}
    listed = "; ".join(f"{count} × {reason} (first: row {first[reason]})" for reason, count in reasons)
    return (
        f"dataset: {len(bad)} of {total} rows are bad, over max_bad_fraction {allowed:g}: {listed}. "
        "Mend them, or raise dataset.max_bad_fraction"
    )


def _texts(row: dict[str, Any], spec: DatasetSpec) -> tuple[str, str]:
    """Instruction and answer of a row. Raises BadRow."""
    answer = row[spec.answer_column]
    if not isinstance(answer, str) or not answer.strip():
        raise BadRow(f"no {spec.answer_column}")
    if spec.instruction_column is None:
        return spec.instruction, answer.strip()
    instruction = row[spec.instruction_column]
    if not isinstance(instruction, str) or not instruction.strip():
        raise BadRow(f"no {spec.instruction_column}")
    return instruction.strip(), answer.strip()


def conversation(instruction: str, answer: str, system_prompt: str | None) -> list[dict[str, Any]]:
    """Messages in the form that every processor's chat template takes."""
    system = [{"role": "system", "content": [{"type": "text", "text": system_prompt}]}] if system_prompt else []
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": instruction}]}
    return [*system, user, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def _where(looked: Looked, held: list[bool], side: bool) -> Looked:
    kept = [place for place, out in enumerate(held) if out is side]
    return Looked([looked.good[place] for place in kept], [looked.keys[place] for place in kept], [])


def _rows(source: Source, looked: Looked, spec: JobSpec) -> Dataset:
    units = {key: number for number, key in enumerate(sorted(set(looked.keys)))}
    numbered = source.rows.select(looked.good).add_column("_row", looked.good)
    numbered = numbered.add_column("_unit", [units[key] for key in looked.keys])
    return numbered.with_transform(partial(_transform, spec=spec, base=source.base, image_column=source.image_column))


def _transform(
    batch: dict[str, list[Any]], spec: JobSpec, base: Path | None, image_column: str
) -> dict[str, list[Any]]:
    dataset, evaluation = spec.dataset, spec.evaluation
    columns = list(batch)
    out: dict[str, list[Any]] = {
        name: [] for name in ("id", "messages", "images", "reference", "labels", "groups", "unit")
    }
    for values in zip(*batch.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        instruction, answer = _texts(row, dataset)
        data = image_bytes(row[image_column], base)
        out["id"].append(f"row-{row['_row']}")
        out["messages"].append(conversation(instruction, answer, dataset.system_prompt))
        out["images"].append([decode(data, max_pixels=dataset.max_image_pixels, max_side=dataset.image_max_side)])
        out["reference"].append(answer)
        out["labels"].append({name: str(row[label.column]) for name, label in evaluation.labels.items()})
        out["unit"].append(row["_unit"])
        out["groups"].append({column: str(row[column]) for column in evaluation.groups})
    return out


def _require_columns(source: Source, spec: JobSpec) -> None:
    wanted = {
        f"dataset.image_column is {source.image_column}": source.image_column,
        f"dataset.answer_column is {spec.dataset.answer_column}": spec.dataset.answer_column,
        "dataset.instruction_column": spec.dataset.instruction_column,
        "dataset.group_column": spec.dataset.group_column,
        **{f"evaluation.labels.{name}.column": label.column for name, label in spec.evaluation.labels.items()},
        **{f"evaluation.groups has {column}": column for column in spec.evaluation.groups},
    }
    present = source.rows.column_names
    missing = [where for where, column in wanted.items() if column is not None and column not in present]
    if missing:
        raise DataError(f"{'; '.join(missing)}: no such column; the data has {', '.join(present)}")


def _spread(rows: Dataset, most: int) -> Dataset:
    """At most `most` rows, evenly over all, always the same."""
    return rows if len(rows) <= most else rows.select([index * len(rows) // most for index in range(most)])


def _label_values(source: Source, spec: JobSpec) -> dict[str, list[str]]:
    return {
        name: label.values or sorted({str(value) for value in source.rows[label.column] if value is not None})
        for name, label in spec.evaluation.labels.items()
    }


def quarantine_jsonl(data: Data) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in data.quarantined).encode()
