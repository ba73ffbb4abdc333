"""The one look at every row before anything is trained: what cannot be used is set aside with its reason."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from job.data import BadRows
from job.data.images import BadRow, load_anew
from job.data.rows import Message, as_text, read_sample, repeat_images
from job.data.similar import Bits, perceptual_hash
from job.data.sources import Source
from job.data.tables import PATIENT
from job.errors import DataError
from job.record import watched
from job.spec import JobSpec

if TYPE_CHECKING:
    from job.model.lengths import Ruler

MAX_REASONS = 3
CHUNK = 256
"""Rows read from the table at a time."""
WAITING = 16
"""Rows that wait for a store at a time, where images are fetched one by one."""


class Seen(NamedTuple):
    """A good row: its place, its keys (the group column's value if there is one, then a digest of each image), a perceptual
    hash and the size of each picture, its labels, its stratum, its tokens (0 where nobody counted), and whether words are burned
    into its pixels (`yes`, `maybe`, or nothing)."""

    place: int
    keys: tuple[str, ...]
    hashes: tuple[Bits, ...]
    sizes: tuple[tuple[int, int], ...]
    labels: dict[str, str]
    stratum: str
    tokens: int
    burned_in: str
    digest: str
    """SHA-256 of its texts and of its image files."""


def look(
    source: Source, spec: JobSpec, measure: Ruler | None, most: int | None = None
) -> tuple[list[Seen], list[dict[str, Any]], dict[str, Any]]:
    """Read every text and decode every image once, on all cores; with `most`, those of so many rows, evenly over all.

    Returns the good rows, the bad ones as `{"row", "reason"}`, and counts for the plan. Raises DataError when too many are bad.
    """
    from tqdm import tqdm

    dataset = spec.dataset
    there = min(dataset.max_rows or len(source.table.rows), len(source.table.rows))
    total = min(most or there, there)
    places = [place * there // total for place in range(total)]
    good, bad = list[Seen](), list[dict[str, Any]]()

    def examine(place: int, row: dict[str, Any]) -> Seen | str:
        try:
            return _examine(place, row, source, spec, measure)
        except BadRow as reason:
            return str(reason)

    threads = len(os.sched_getaffinity(0)) + (WAITING if source.table.streamed else 0)
    bar = tqdm(total=total, desc="look at data", unit="row", disable=not watched())
    with warnings.catch_warnings(), bar, ThreadPoolExecutor(threads, thread_name_prefix="look") as pool:
        warnings.simplefilter("ignore")  # what Pillow and pydicom find odd in a file is no reason to refuse it
        for start in range(0, total, CHUNK):
            some = places[start : start + CHUNK]
            for place, found in zip(some, pool.map(examine, some, source.rows_at(some)), strict=True):
                bar.update()
                if isinstance(found, str):
                    bad.append({"row": place, "reason": found})
                else:
                    good.append(found)
    if len(bad) > dataset.max_bad_fraction * total or not good:
        raise BadRows(_too_many(source.field, bad, total, dataset.max_bad_fraction), bad)
    return (
        good,
        bad,
        {"rows": there} | _facts(source.field, good, bad, spec) | ({"looked_at": total} if total < there else {}),
    )


def _examine(index: int, row: dict[str, Any], source: Source, spec: JobSpec, measure: Ruler | None) -> Seen:
    dataset = spec.dataset
    values = source.read(row)
    sample = read_sample(values, dataset, source.reading)
    loaded = [load_anew(value, source.files, dataset, len(sample.images)) for value in sample.images]
    files, shown = [data for each, _ in loaded for data in each], [each for _, each in loaded]
    messages = repeat_images(sample.messages, [len(each) for each in shown])
    sizes = tuple(picture.size for each in shown for picture in each)
    keys = tuple(hashlib.sha256(data).hexdigest() for data in files)
    if not keys:  # nothing but words: the same question is not asked on both sides
        asked = [part["text"] for message in messages[:-1] for part in message["content"]]
        keys = (hashlib.sha256("\0".join(asked).encode("utf-8", "surrogatepass")).hexdigest(),)
    if dataset.group_column:
        keys = (_needed(values, dataset.group_column), *keys)
    elif values.get(PATIENT):
        keys = (values[PATIENT], *keys)
    stratum = _needed(values, dataset.stratify_column) if dataset.stratify_column else ""
    labels = {name: as_text(values.get(label.column)) for name, label in spec.evaluation.labels.items()}
    tokens = _length(messages, sizes, spec, measure) if measure else 0
    hashes = tuple(perceptual_hash(picture) for each in shown for picture in each)
    burned_in = max((str(picture.info.get("burned_in", "")) for each in shown for picture in each), default="")
    digest = hashlib.sha256(json.dumps([keys, messages]).encode()).hexdigest()
    return Seen(index, keys, hashes, sizes, labels, stratum, tokens, burned_in, digest)


def _length(messages: list[Message], sizes: tuple[tuple[int, int], ...], spec: JobSpec, measure: Ruler) -> int:
    try:
        length = measure(messages, list(sizes))
    except DataError as error:
        raise BadRow(str(error)) from error
    most, policy = spec.training.max_length, spec.dataset.over_length
    if length.whole > most and policy == "drop":
        raise BadRow(f"longer than training.max_length {most}")
    if length.prompt >= most and policy == "truncate":
        raise BadRow(f"longer than training.max_length {most} before the answer begins")
    return length.whole


def _needed(row: dict[str, Any], column: str) -> str:
    said = as_text(row.get(column))
    if not said:
        raise BadRow(f"no {column}")
    return said


def _facts(field: str, good: list[Seen], bad: list[dict[str, Any]], spec: JobSpec) -> dict[str, Any]:
    lengths = [row.tokens for row in good if row.tokens]
    sizes = sorted((size for row in good for size in row.sizes), key=math.prod)
    over = sum(length > spec.training.max_length for length in lengths)
    if over and spec.dataset.over_length == "fail":
        raise DataError(
            f"{field}: {over} of {len(good)} rows have more than training.max_length {spec.training.max_length} tokens (the "
            f"longest {max(lengths)}); raise it, set dataset.image_max_side, or set dataset.over_length to drop or truncate"
        )
    facts: dict[str, Any] = {
        f"burned_in_{said}": sum(row.burned_in == said for row in good) for said in ("yes", "maybe")
    }
    facts["reasons"] = dict(Counter(row["reason"] for row in bad).most_common())
    facts |= {"without_images": sum(not row.sizes for row in good), "over_length": over}
    facts |= {"tokens": {"median": int(np.median(lengths)), "longest": max(lengths)}} if lengths else {}
    if sizes:
        least, median, largest = (sizes[len(sizes) * part // 2 - (part == 2)] for part in range(3))
        most = max(len(row.sizes) for row in good)
        facts["images"] = {"count": len(sizes), "smallest": least, "median": median, "largest": largest, "most": most}
    return facts


def _too_many(field: str, bad: list[dict[str, Any]], total: int, allowed: float) -> str:
    reasons = Counter(row["reason"] for row in bad).most_common(MAX_REASONS)
    first = {row["reason"]: row["row"] for row in reversed(bad)}
    listed = "; ".join(f"{count} × {reason} (first: row {first[reason]})" for reason, count in reasons)
    return (
        f"{field}: {len(bad)} of {total} rows are bad, over max_bad_fraction {allowed:g}: {listed}. "
        "Mend them, or raise dataset.max_bad_fraction"
    )
