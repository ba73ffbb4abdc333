"""Files of rows → one lazy table through `datasets`: JSON, CSV and archives as lines, parquet and the hub as they are."""

from __future__ import annotations

import csv
import errno
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.data.images import BadRow
from job.errors import DataError, NotAllowed, SpecError, Unavailable
from job.record import bytes_text
from job.spec import DatasetSpec
from job.store.local import disk

if TYPE_CHECKING:
    from datasets import Dataset

LINE = "_line"
"""The one column of a table whose rows are lines of JSON. They are parsed when they are used: no kind of value has to be guessed
for a column, and one broken line spoils one row."""
PATIENT = "_patient"
"""A digest of DICOM's PatientID: it groups rows for the split, is no column that a spec can name, and is written nowhere."""
FULL = (errno.ENOSPC, errno.EDQUOT)
AT_ONCE = 100
"""Lines written at a time: some hold whole images."""


def read_table(files: list[Path], cache: Path, field: str) -> Dataset:
    """The rows of files of one kind. Raises DataError naming the first that cannot be read."""
    if files[0].suffix.lower() != ".parquet":
        return as_table((line for file in files for line in lines_of(file, field)), cache, str(files[0]), field)
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowException, parquet

    try:
        for file in files:
            found = parquet.read_metadata(file)
            if not found.num_rows:
                raise ValueError("it has no rows")
            if set(found.schema.names) != set(parquet.read_metadata(files[0]).schema.names):
                raise ValueError(f"its columns are not those of {files[0].name}")
        rows = Dataset.from_parquet([glob.escape(str(file)) for file in files], cache_dir=str(cache))
    except (ArrowException, DatasetGenerationError, ValueError, OSError) as error:
        if any(isinstance(each, OSError) and each.errno in FULL for each in (error, error.__cause__)):
            size = bytes_text(sum(each.stat().st_size for each in files))
            raise SpecError(
                f"{field}: {files[0].parent} is unpacked to {cache}, about as large as its {size}, and that disk is full; point "
                "JOB_SCRATCH at a larger one"
            ) from error
        cause = str(error.__cause__ or error).splitlines()[0][:200]
        raise DataError(f"{field}: {file} cannot be read as parquet: {cause}") from error
    assert isinstance(rows, Dataset)
    return undecoded(rows)


def lines_of(file: Path, field: str) -> Iterator[str]:
    """A file as lines of JSON: its own, or what a CSV, or one long list, says line by line. The words of a CSV stay words:
    patient 007 is not 7."""
    with disk(file), file.open("rb") as raw:
        encoding = "utf-16" if raw.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    with file.open(encoding=encoding, errors="replace", newline="" if _is_csv(file) else "\n") as stream:
        try:
            if _is_csv(file):
                yield from _csv_lines(stream)
            elif stream.read(4096).lstrip().startswith("["):
                stream.seek(0)
                yield from map(json.dumps, json.load(stream))
            else:
                stream.seek(0)
                yield from (line for line in stream if line.strip())
        except (ValueError, RecursionError, csv.Error) as error:
            raise DataError(f"{field}: {file} cannot be read: {error}; mend it, or write it anew in UTF-8") from error


def _is_csv(file: Path) -> bool:
    return file.suffix.lower() in (".csv", ".tsv")


def _csv_lines(stream: Iterator[str]) -> Iterator[str]:
    """Rows by the names in the first line that is not empty; null for one with more fields than names."""
    csv.field_size_limit(2**31 - 1)
    head = next((line for line in stream if line.strip()), "")
    try:
        delimiter = csv.Sniffer().sniff(head, ",;\t|").delimiter
    except csv.Error:
        delimiter = ","
    names = next(csv.reader([head], delimiter=delimiter, skipinitialspace=True), [])
    if len(set(names)) < len(names):
        raise csv.Error("two columns have the same name")
    # Strict: a quote that is never closed would swallow the rows behind it.
    for row in csv.DictReader(stream, names, delimiter=delimiter, strict=True, skipinitialspace=True):
        yield json.dumps(None if None in row else row)


def as_table(lines: Iterable[str], cache: Path, name: str, field: str) -> Dataset:
    """Lines as a table in a file on scratch, which is mapped and not held in memory. Raises DataError when there are none."""
    import pyarrow
    from datasets import Dataset

    cache.mkdir(parents=True, exist_ok=True)
    file = cache / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.arrow"
    partial, left, count = file.with_suffix(f".{os.getpid()}"), iter(lines), 0
    with disk(cache), pyarrow.ipc.new_stream(str(partial), pyarrow.schema({LINE: pyarrow.string()})) as out:
        while some := list(islice(left, AT_ONCE)):
            out.write_batch(pyarrow.record_batch({LINE: some}))
            count += len(some)
    if not count:
        raise DataError(f"{field}: {name} has no rows")
    partial.rename(file)
    return Dataset.from_file(str(file))


def read_line(line: str) -> dict[str, Any]:
    """Raises BadRow."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRow("line is not JSON") from error
    if not isinstance(row, dict):
        raise BadRow("line is not a JSON object, or has more fields than there are columns")
    if "\ufffd" in line or "\\ufffd" in line:
        raise BadRow("line is not UTF-8; save the table as UTF-8")
    return row


def columns_of(rows: Dataset, field: str) -> tuple[str, ...]:
    """Names of the columns; of lines, all that any of them has. Raises DataError when not one line can be read."""
    if rows.column_names != [LINE]:
        return tuple(rows.column_names)
    names: dict[str, None] = {}
    for batch in rows.iter(1000):
        for line in batch[LINE]:
            try:
                names |= dict.fromkeys(read_line(line))
            except BadRow as error:
                reason = error
    if not names:
        raise DataError(f"{field}: not one row can be read: {reason}")
    return tuple(name for name in names if name != PATIENT)


def from_hub(spec: DatasetSpec, path: str, split: str, cache: Path, field: str) -> Dataset:
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.constants import is_offline_mode

    try:
        rows = load_dataset(path, spec.name, split=split, revision=spec.revision, cache_dir=str(cache))
    except DatasetNotFoundError as error:
        if "gated" in str(error):
            page = f"https://huggingface.co/datasets/{path}"
            raise NotAllowed(f"{field}: {path} is gated; ask for access at {page} and set HF_TOKEN") from error
        if spec.revision and "evision" in f"{error} {error.__cause__}":
            raise DataError(f"dataset.revision: {path} has no revision {spec.revision}") from error
        raise DataError(f"{field}: there is no folder and no hub dataset {path} that this token may see") from error
    except ValueError as error:
        raise DataError(f"{field}: {path}: {str(error).splitlines()[0]}") from error
    except OSError as error:
        if is_offline_mode():
            raise DataError(
                f"{field}: {path} is no folder here, and HF_HUB_OFFLINE is set; gather it with job prefetch"
            ) from error
        raise Unavailable(
            f"{field}: neither a folder nor reachable on the hub: {path} ({type(error).__name__})"
        ) from error
    assert isinstance(rows, Dataset)
    return rows


def undecoded(rows: Dataset) -> Dataset:
    """The rows as they are stored: without its features, `datasets` hands on the bytes of images, and one broken image spoils one
    row."""
    from datasets import Dataset

    return Dataset(rows.data.replace_schema_metadata(None))
