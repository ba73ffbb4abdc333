"""From what a user names (folder, file, bucket, hub id) to a lazy table of rows, through `datasets`."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from job.errors import DataError, NotAllowed, Unavailable
from job.spec import DatasetSpec
from job.stage_in import local_path

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("job")

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")


class Source(NamedTuple):
    """Rows, the folder that relative image paths start from, and how that was decided."""

    rows: Dataset
    base: Path | None
    image_column: str
    decided: str


def open_source(spec: DatasetSpec, path: str, split: str, scratch: Path, field: str = "dataset.path") -> Source:
    """The rows at `path`, images not decoded. Raises DataError naming `field` when there is nothing to read."""
    here = local_path(path, scratch, field)
    cache = str(scratch / "cache" / "datasets")
    if not here.exists():
        if spec.format in ("auto", "hub") and HUB_ID.fullmatch(path):
            return Source(_hub(spec, path, split, cache, field), None, spec.image_column, "hub dataset")
        raise DataError(f"{field}: {path} does not exist")
    metadata = _metadata(here, split) if here.is_dir() and spec.format in ("auto", "imagefolder") else None
    if metadata is not None:
        rows = _load(BUILDERS[metadata.suffix], [metadata], cache, field)
        column = "file_name" if "file_name" in rows.column_names else spec.image_column
        return Source(_undecoded(rows, column), metadata.parent, column, f"image folder with {metadata.name}")
    if spec.format == "imagefolder":
        raise DataError(f"{field}: {path} holds none of {', '.join(METADATA)}")
    files = [here] if here.is_file() else _files(here, split)
    if spec.format != "auto":
        files = [file for file in files if BUILDERS[file.suffix] == spec.format]
    if not files or files[0].suffix not in BUILDERS:
        raise DataError(f"{field}: {path} holds no metadata file with images beside it, no JSONL, CSV or parquet")
    builder = BUILDERS[files[0].suffix]
    files = [file for file in files if BUILDERS.get(file.suffix) == builder]
    rows = _undecoded(_load(builder, files, cache, field), spec.image_column)
    return Source(rows, here if here.is_dir() else here.parent, spec.image_column, f"{len(files)} {builder} file(s)")


def _metadata(folder: Path, split: str) -> Path | None:
    return next((path for sub in (split, ".") for name in METADATA if (path := folder / sub / name).is_file()), None)


def _files(folder: Path, split: str) -> list[Path]:
    """Table files of one kind; those named after the split when there are any."""
    found = sorted(path for path in folder.rglob("*") if path.suffix in BUILDERS and path.is_file())
    of_split = [
        path for path in found if re.search(rf"(^|[/_.-]){re.escape(split)}[/_.-]", str(path.relative_to(folder)))
    ]
    found = of_split or found
    return [path for path in found if path.suffix == found[0].suffix]


def _load(builder: str, files: list[Path], cache: str, field: str) -> Dataset:
    from datasets import Dataset, load_dataset

    if not any(file.stat().st_size for file in files):
        raise DataError(f"{field}: {files[0]} is empty")
    try:
        rows = load_dataset(builder, data_files=[str(file) for file in files], split="train", cache_dir=cache)
    except Exception as error:  # what a parser raises for a broken file is its own affair
        cause = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"{field}: {files[0]} cannot be read as {builder}: {cause}") from error
    if not isinstance(rows, Dataset) or not len(rows):
        raise DataError(f"{field}: {files[0]} has no rows")
    return rows


def _hub(spec: DatasetSpec, path: str, split: str, cache: str, field: str) -> Dataset:
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        rows = load_dataset(path, spec.name, split=split, revision=spec.revision, cache_dir=cache)
    except DatasetNotFoundError as error:
        if "gated" in str(error):
            page = f"https://huggingface.co/datasets/{path}"
            raise NotAllowed(f"{field}: {path} is gated; ask for access at {page} and set HF_TOKEN") from error
        raise DataError(f"{field}: there is no folder and no hub dataset {path}") from error
    except ValueError as error:
        raise DataError(f"{field}: {path}: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise Unavailable(
            f"{field}: neither a folder nor reachable on the hub: {path} ({type(error).__name__})"
        ) from error
    assert isinstance(rows, Dataset)
    return _undecoded(rows, spec.image_column)


def _undecoded(rows: Dataset, column: str) -> Dataset:
    """Embedded images stay bytes until a row is used, so that one broken image spoils one row."""
    from datasets import Image

    feature = rows.features.get(column)
    return rows.cast_column(column, Image(decode=False)) if isinstance(feature, Image) else rows
