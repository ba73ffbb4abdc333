"""Validates every row once before training; rows that cannot be used are quarantined with a reason."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from job.config.schema import DatasetSpec, JobSpec
from job.data.burned_in import BurnedIn
from job.data.cells import as_text, labels_of
from job.data.conversations import Message, last_answer, prompt_text, read_sample, repeat_images
from job.data.decoder import dismiss
from job.data.facts import ImageFacts, QuarantinedRow, ShrunkFacts, SplitFacts, TokenFacts
from job.data.given_away import given_away, stated_answer, words
from job.data.images import WHOLE, is_absolute, load_anew
from job.data.layouts import split_of
from job.data.near_duplicates import Thumbnail, thumbnail
from job.data.pixels import BadRow
from job.data.refusals import refuse_unusable
from job.data.sources import Source
from job.data.split import same_name
from job.data.tables import PATIENT
from job.errors import DataError
from job.output.identity import row_identity
from job.runtime.progress import progress_bar

if TYPE_CHECKING:
    from job.model.token_length import TokenCounter

MOST_COUNTED = 25_000_000
"""Pixels of a row whose tokens are counted as if it were not shrunk: the processor is given blank images of that size."""
CHUNK = 256
"""Rows read from the table at a time."""
WAITING = 16
"""Rows that wait for a store at a time, if images are fetched one by one."""


class ValidatedRow(NamedTuple):
    """A good row: its index, its keys (the group column's value if there is one, then a digest of each image), thumbnail
    and size of each image, its labels, its stratum, its tokens and those whose loss is taken (0 if not counted), and
    whether text is burned into its pixels (`yes`, `maybe`, `masked`, or nothing)."""

    place: int
    keys: tuple[str, ...]
    thumbnails: tuple[Thumbnail, ...]
    sizes: tuple[tuple[int, int], ...]
    labels: dict[str, str | list[str]]
    stratum: str
    tokens: int
    learned: int
    burned_in: str
    digest: str
    """SHA-256 of its texts and image files."""
    lossy: bool
    """Whether its texts contain U+FFFD, which programs write for a character that they could not decode."""
    identity: bytes
    """See `job.output.identity.row_identity`."""
    absolute: bool
    """Whether it names an image by an absolute path."""
    stated: str
    """The answer that its own prompt states (see `given_away.stated_answer`), if any."""
    blank: bool
    """Whether an image is of one colour throughout."""
    default_window: bool
    """Whether an image was shown with a window that neither its file nor the spec gives."""
    whole: tuple[tuple[int, int], ...]
    """Sizes of the images before they were shrunk."""
    other_split: str
    """The split that its own split column names, if that is not the one being read; else empty."""

    @property
    def id(self) -> str:
        return f"row-{self.place}"

    @property
    def compared(self) -> list[str]:
        """Its keys as rows are compared by them: one patient may be spelled in several ways."""
        return [same_name(key) for key in self.keys]


def validate_rows(
    source: Source, spec: JobSpec, measure: TokenCounter | None, most: int | None = None
) -> tuple[list[ValidatedRow], list[QuarantinedRow], SplitFacts]:
    """Reads every text and decodes every image once, on all cores; with `most`, those of only that many rows, evenly spread.

    Returns the good rows, the bad ones, and counts for the plan. Raises DataError if too many are bad.
    """
    dataset = spec.dataset
    there = min(dataset.max_rows or len(source.table.rows), len(source.table.rows))
    total = min(most or there, there)
    places = [place * there // total for place in range(total)]
    good, bad, burned = list[ValidatedRow](), list[QuarantinedRow](), list[int]()

    def examine(place: int, row: dict[str, Any]) -> ValidatedRow | str:
        try:
            return _examine(place, row, source, spec, measure)
        except BurnedIn as reason:
            burned.append(place)
            return str(reason)
        except BadRow as reason:
            return str(reason)
        except RecursionError:
            return "values nested too deeply"

    threads = len(os.sched_getaffinity(0)) + (WAITING if source.table.streamed else 0)
    bar = progress_bar("validate rows", total)
    with warnings.catch_warnings(), bar, ThreadPoolExecutor(threads, thread_name_prefix="look") as pool:
        warnings.simplefilter("ignore")  # a warning from Pillow or pydicom is no reason to refuse a file
        for start in range(0, total, CHUNK):
            some = places[start : start + CHUNK]
            for place, found in zip(some, pool.map(examine, some, source.rows_at(some)), strict=True):
                bar.update()
                if isinstance(found, str):
                    bad.append(QuarantinedRow(place, found))
                else:
                    good.append(found)
    decoders = dismiss()
    good, bad = _without_given_away(good, bad, source, dataset)
    refuse_unusable(source, spec, good, bad, burned, total)
    facts = replace(
        _facts(good, bad, spec, there),
        split_column=next(iter(source.reading.splits), None),
        filtered=source.table.filtered,
        decoders=decoders,
        shrunk=_shrunk(good, source, dataset, measure),
    )
    return good, bad, facts if total == there else replace(facts, looked_at=total)


def _without_given_away(
    good: list[ValidatedRow], bad: list[QuarantinedRow], source: Source, dataset: DatasetSpec
) -> tuple[list[ValidatedRow], list[QuarantinedRow]]:
    """Moves rows whose prompt gives the answer away from the good rows to the bad ones."""

    def compared(count: int) -> list[tuple[str, str]]:
        some = [row.place for row in good[:: -(-len(good) // count)]]
        samples = [read_sample(source.read(row), dataset, source.reading) for row in source.rows_at(some)]
        return [(words(prompt_text(each.messages)), words(last_answer(each.messages))) for each in samples]

    found = set(given_away({row.place: row.stated for row in good if row.stated}, len(good), compared))
    if not found:
        return good, bad
    added = [QuarantinedRow(place, "the answer is already in the instruction or history") for place in sorted(found)]
    return [row for row in good if row.place not in found], sorted([*bad, *added], key=lambda each: each.row)


def _examine(
    index: int, row: dict[str, Any], source: Source, spec: JobSpec, measure: TokenCounter | None
) -> ValidatedRow:
    dataset = spec.dataset
    values = source.read(row)
    sample = read_sample(values, dataset, source.reading)
    loaded = [load_anew(value, source.files, dataset, len(sample.images)) for value in sample.images]
    files, shown = [data for each, _ in loaded for data in each], [each for _, each in loaded]
    messages = repeat_images(sample.messages, [len(each) for each in shown], dataset.dicom.frames)
    sizes = tuple(picture.size for each in shown for picture in each)
    keys = tuple(pictures := [hashlib.sha256(data).hexdigest() for data in files])
    if not keys:  # text only: one question must not be asked on both sides
        asked = [part["text"] for message in messages[:-1] for part in message["content"]]
        keys = (hashlib.sha256("\0".join(asked).encode("utf-8", "surrogatepass")).hexdigest(),)
    if dataset.group_column:
        group = _needed(values, dataset.group_column)
        if not same_name(group):
            raise BadRow(f"no {dataset.group_column}")
        if isinstance(several := values[dataset.group_column], list) and len({*map(as_text, several)} - {""}) > 1:
            raise BadRow(f"{dataset.group_column} has several values, and a row can be in one group only")
        keys = (group, *keys)
    elif values.get(PATIENT):
        keys = (values[PATIENT], *keys)
    stratum = _needed(values, dataset.stratify_column) if dataset.stratify_column else ""
    labels = labels_of(values, spec.evaluation.labels)
    tokens, learned = _length(messages, sizes, spec, measure) if measure else (0, 0)
    thumbnails = tuple(thumbnail(picture) for each in shown for picture in each)
    burned_in = max((str(picture.info.get("burned_in", "")) for each in shown for picture in each), default="")
    text = json.dumps([keys, messages])
    digest, lossy = hashlib.sha256(text.encode()).hexdigest(), "\\ufffd" in text
    identity = row_identity(pictures, [digest, sample.weight])
    absolute = any(is_absolute(image, source.files) for image in sample.images)
    other = _other_split([values.get(name) for name in source.reading.splits], dataset.split)
    return ValidatedRow(
        index,
        keys,
        thumbnails,
        sizes,
        labels,
        stratum,
        tokens,
        learned,
        burned_in,
        digest,
        lossy,
        identity,
        absolute,
        stated_answer(messages),
        any(low == high for each in shown for picture in each for low, high in [picture.convert("L").getextrema()]),
        any(picture.info.get("default_window") for each in shown for picture in each),
        tuple(picture.info[WHOLE] for each in shown for picture in each),
        other,
    )


def _other_split(said: list[Any], split: str) -> str:
    wanted = split_of(split)
    named = (split_of(each) for each in said if isinstance(each, str))
    return next((own for own in named if own and wanted and own != wanted), "")


def _length(
    messages: list[Message], sizes: tuple[tuple[int, int], ...], spec: JobSpec, measure: TokenCounter
) -> tuple[int, int]:
    try:
        length = measure(messages, list(sizes))
    except DataError as error:
        raise BadRow(str(error)) from error
    most, policy = spec.training.max_length, spec.dataset.over_length
    if length.whole > most and policy == "drop":
        raise BadRow(f"longer than training.max_length {most}")
    if length.prompt >= most and policy == "truncate":
        raise BadRow(f"longer than training.max_length {most} before the answer begins")
    return length.whole, length.whole - length.prompt * spec.training.train_on_responses_only


def _needed(row: dict[str, Any], column: str) -> str:
    said = as_text(row.get(column))
    if not said:
        raise BadRow(f"no {column}")
    return said


def _facts(good: list[ValidatedRow], bad: list[QuarantinedRow], spec: JobSpec, there: int) -> SplitFacts:
    lengths = [row.tokens for row in good if row.tokens]
    sizes = sorted((size for row in good for size in row.sizes), key=math.prod)
    others, burned_in = Counter(row.other_split for row in good), Counter(row.burned_in for row in good)
    del others[""]
    images = None
    if sizes:
        least, median, largest = (sizes[len(sizes) * part // 2 - (part == 2)] for part in range(3))
        images = ImageFacts(len(sizes), least, median, largest, max(len(row.sizes) for row in good))
    return SplitFacts(
        rows=there,
        other_splits=dict(others),
        burned_in_yes=burned_in["yes"],
        burned_in_maybe=burned_in["maybe"],
        burned_in_masked=burned_in["masked"],
        reasons=dict(Counter(row.reason for row in bad).most_common()),
        without_images=sum(not row.sizes for row in good),
        over_length=sum(length > spec.training.max_length for length in lengths),
        lossy=sum(row.lossy for row in good),
        absolute=sum(row.absolute for row in good),
        blank=sum(row.blank for row in good),
        default_window=sum(row.default_window for row in good),
        tokens=TokenFacts(int(np.median(lengths)), max(lengths), max(row.learned for row in good)) if lengths else None,
        images=images,
    )


def _shrunk(
    good: list[ValidatedRow], source: Source, dataset: DatasetSpec, measure: TokenCounter | None
) -> ShrunkFacts | None:
    pairs = [
        (*pair, row.place) for row in good for pair in zip(row.whole, row.sizes, strict=True) if pair[0] != pair[1]
    ]
    if not pairs:
        return None
    pairs.sort(key=lambda pair: math.prod(pair[0]))
    whole, size, place = pairs[len(pairs) // 2]
    row = next(row for row in good if row.place == place)
    if measure is None or sum(map(math.prod, row.whole)) > MOST_COUNTED:
        return ShrunkFacts(len(pairs), whole, size)
    sample = read_sample(source.read(source.rows_at([place])[0]), dataset, source.reading)
    counts = [len(row.sizes)] if len(sample.images) == 1 else [1] * len(sample.images)
    if sum(counts) != len(row.sizes):  # several files of several frames
        return ShrunkFacts(len(pairs), whole, size)
    messages = repeat_images(sample.messages, counts, dataset.dicom.frames)
    try:
        return ShrunkFacts(len(pairs), whole, size, measure(messages, list(row.whole)).whole, row.tokens)
    except DataError:  # the processor refuses an image of that size
        return ShrunkFacts(len(pairs), whole, size)
