"""Files of rows → one lazy table through `datasets`: JSON, CSV and archives as lines, parquet and the hub as they are."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from job.data.images import BadRow
from job.errors import DataError, NotAllowed, Unavailable
from job.spec import DatasetSpec

if TYPE_CHECKING:
    from datasets import Dataset

LINE = "_line"
"""The one column of a table whose rows are lines of JSON. They are parsed when they are used: no kind of value has to be guessed
for a column, and one broken line spoils one row."""
PATIENT = "_patient"
"""A digest of DICOM's PatientID: it groups rows for the split, is no column that a spec can name, and is written nowhere."""


def read_table(kind: str, files: list[Path], cache: Path, field: str) -> Dataset:
    from datasets import Dataset, load_dataset

    if not any(file.stat().st_size for file in files):
        raise DataError(f"{field}: {files[0]} is empty")
    options: dict[str, Any] = {}
    try:
        if kind in ("json", "csv"):
            files = [_as_lines(file, kind, cache / "lines") for file in files]
            kind, options = "text", {"encoding": "utf-8-sig", "encoding_errors": "replace"}
        names = [str(file) for file in files]
        rows = load_dataset(kind, data_files=names, split="train", cache_dir=str(cache), **options)
    except Exception as error:  # what a parser raises for a broken file is its own affair
        cause = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"{field}: {files[0]} cannot be read as {kind}: {cause}") from error
    if not isinstance(rows, Dataset) or not len(rows):
        raise DataError(f"{field}: {files[0]} has no rows")
    return rows.rename_column("text", LINE) if kind == "text" else undecoded(rows)


def _as_lines(file: Path, kind: str, made: Path) -> Path:
    """A file of JSON lines: itself, or what a CSV, or one long list, says line by line. The words of a CSV stay words: patient
    007 is not 7."""
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        head = stream.read(4096)
        stream.seek(0)
        if kind == "json" and not head.lstrip().startswith("["):
            return file
        mark = file.stat()
        name = hashlib.sha256(f"{file.resolve()} {mark.st_size} {mark.st_mtime_ns}".encode()).hexdigest()
        lines = made / f"{name[:24]}.jsonl"
        lines.parent.mkdir(parents=True, exist_ok=True)
        rows = json.loads(stream.read().lstrip("\ufeff")) if kind == "json" else _csv(stream, head)
        with lines.open("w", encoding="utf-8") as out:
            out.writelines(f"{json.dumps(row)}\n" for row in rows)
    return lines


def _csv(stream: IO[str], head: str) -> Iterator[dict[str, str] | None]:
    """Rows by the names in the first line; None for one with more fields than names."""
    csv.field_size_limit(2**31 - 1)
    try:
        delimiter = csv.Sniffer().sniff(head.splitlines()[0], ",;\t|").delimiter
    except csv.Error:
        delimiter = ","
    for row in csv.DictReader(stream, delimiter=delimiter):
        yield None if None in row else row


def as_table(rows: Iterable[dict[str, Any]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict({LINE: [json.dumps(row) for row in rows]})


def read_line(line: str) -> dict[str, Any]:
    """Raises BadRow."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRow("line is not JSON") from error
    if not isinstance(row, dict):
        raise BadRow("line is not a JSON object")
    if "\ufffd" in line:
        raise BadRow("line is not UTF-8")
    return row


def columns_of(rows: Dataset) -> list[str]:
    """Names of the columns; of lines, all that any of them has."""
    if rows.column_names != [LINE]:
        return list(rows.column_names)
    names: dict[str, None] = {}
    for batch in rows.iter(1000):
        for line in batch[LINE]:
            try:
                names |= dict.fromkeys(read_line(line))
            except BadRow:
                continue
    return [name for name in names if name != PATIENT]


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
    return undecoded(rows)


def undecoded(rows: Dataset) -> Dataset:
    """Embedded images stay bytes until a row is used, so that one broken image spoils one row."""
    from datasets import Dataset, Features, Image

    def plain(feature: Any) -> Any:
        if isinstance(feature, Image):
            return Image(decode=False)
        if isinstance(feature, dict):
            return {name: plain(part) for name, part in feature.items()}
        if isinstance(feature, list):
            return [plain(part) for part in feature]
        inner = getattr(feature, "feature", None)
        return type(feature)(plain(inner)) if inner is not None else feature

    features = Features({name: plain(feature) for name, feature in rows.features.items()})
    info = rows.info.copy()
    info.features = features
    return Dataset(rows.data.cast(features.arrow_schema), info=info)  # `Dataset.cast` would copy every image
