"""Reads Parquet and Arrow files into one lazy table of the columns in use, each with the widest type found in any file."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from job.data.classes import Kind, agreed, kinds_of
from job.data.floats import Floats, floats_of
from job.data.pixels import LARGEST
from job.errors import DataError, JobError, SpecError
from job.runtime.limits import host_memory
from job.runtime.status import bytes_text

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import DataType, RecordBatchFileReader, RecordBatchStreamReader, Schema

FULL = (errno.ENOSPC, errno.EDQUOT)
FIRST = 20
"""Rows read to see what a column holds."""
AT_ONCE = 100
"""Rows written at a time; some hold whole images."""


class Rows(NamedTuple):
    """The contents of a table's files: lazy rows, the names of all columns, the kinds of class columns, and the properties of
    float columns."""

    rows: Dataset
    columns: tuple[str, ...]
    classes: dict[str, Kind]
    floats: dict[str, Floats]
    notes: tuple[str, ...] = ()
    """What was read of the files, if not simply all their rows."""
    of_split: bool = False
    """Whether a list or sheet in them is named after the split."""


Choose = Callable[[dict[str, tuple[str, ...]]], Iterable[str]]
"""Maps the columns of each file to the columns to read. Raises DataError for files that do not belong together."""


def every(tables: dict[str, tuple[str, ...]]) -> Iterable[str]:
    return dict.fromkeys(name for columns in tables.values() for name in columns)


def titled(files: list[Path]) -> dict[str, Path]:
    """Returns the files by name, or by full path if two share a name."""
    short = {file.name: file for file in files}
    return short if len(short) == len(files) else {str(file): file for file in files}


def read_columns(files: list[Path], cache: Path, field: str, choose: Choose) -> Rows:
    """Reads Parquet or Arrow files. Only the columns in use are read, so files may differ in the others."""
    from datasets import Dataset, Features, concatenate_datasets
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowException, parquet

    file, schemas, titles = files[0], dict[str, "Schema"](), titled(files)
    try:
        for title, file in titles.items():
            if file.suffix.lower() == ".arrow":
                schemas[title] = _arrow(file).schema
            elif parquet.read_metadata(file).num_rows:  # Spark writes some without rows
                schemas[title] = parquet.read_schema(file)
    except (ArrowException, ValueError, OSError) as error:
        raise _unreadable(error, [file], cache, field) from error
    if not schemas:
        raise DataError(f"{field}: {file} has no rows")
    files = [titles[title] for title in schemas]
    columns = {name: tuple(schema.names) for name, schema in schemas.items()}
    used = [name for name in every(columns) if name in set(choose(columns))]
    try:
        schema = _unified(schemas, used, field)
        if files[0].suffix.lower() == ".arrow":
            rows = concatenate_datasets([_mapped(file, schema, cache) for file in files])
        else:
            for file in files:
                _refuse_giants(file, set(used), field)
            names, features = [glob.escape(str(file)) for file in files], Features.from_arrow_schema(schema)
            rows = Dataset.from_parquet(names, cache_dir=str(_made_from(files, cache)), columns=used, features=features)
    except (ArrowException, DatasetGenerationError, ValueError, OSError) as error:
        raise _unreadable(error, files, cache, field) from error
    assert isinstance(rows, Dataset)
    if not len(rows):
        raise DataError(f"{field}: {', '.join(map(str, files[:3]))} has no rows")
    classes = agreed(((name, kinds_of(schema)) for name, schema in schemas.items()), field)
    classes = {name: classes[name] for name in used if name in classes}
    return Rows(undecoded(rows), tuple(every(columns)), classes, floats_of(rows))


def _refuse_giants(file: Path, used: set[str], field: str) -> None:
    """Raises DataError if the metadata of a Parquet file says that its values are too large on average, or that a row group,
    which is read as a whole, does not fit the host memory: a few megabytes can unpack to gigabytes."""
    from pyarrow import parquet

    metadata, free = parquet.read_metadata(file), host_memory().free
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        whole = 0
        for column in map(group.column, range(group.num_columns)):
            name, size = column.path_in_schema.partition(".")[0], column.total_uncompressed_size
            whole += size if name in used else 0
            if name in used and size > LARGEST * group.num_rows:
                raise DataError(
                    f"{field}: {file} has values of {size / group.num_rows / 1e9:.1f} GB in column {name}, over "
                    f"{LARGEST / 1e9:g}; rewrite it without them"
                )
        if whole > free:
            raise DataError(
                f"{field}: {file} has {bytes_text(whole)} in one row group, which is read as a whole, and {bytes_text(free)} of "
                "memory are free; rewrite it with fewer rows in a group, or without giant values"
            )


def _made_from(files: list[Path], cache: Path) -> Path:
    """Returns the cache folder for these files in their current state, and removes those for earlier states. `datasets`
    identifies a file by path and time, which an earlier file at that path may share."""
    states = [(str(file), *_state(file.stat())) for file in files]
    mine = cache / hashlib.sha256(str(sorted(map(str, files))).encode()).hexdigest()[:16]
    folder = mine / hashlib.sha256(str(states).encode()).hexdigest()[:16]
    for other in mine.glob("*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _arrow(file: Path) -> RecordBatchStreamReader | RecordBatchFileReader:
    """Opens an Arrow file. `datasets` saves streams; other programs write the form with an index at the end."""
    import pyarrow

    source = pyarrow.memory_map(str(file))
    try:
        return pyarrow.ipc.open_stream(source)
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(source)


def _mapped(file: Path, schema: Schema, cache: Path) -> Dataset:
    """Returns the columns of `schema` from an Arrow file: in place if possible, else converted into `cache`."""
    import pyarrow
    from datasets import Dataset
    from datasets.table import table_cast

    reader = _arrow(file)
    alike = all(reader.schema.field(name).type == schema.field(name).type for name in schema.names)
    if alike and isinstance(reader, pyarrow.RecordBatchStreamReader):
        return undecoded(Dataset.from_file(str(file))).select_columns(schema.names)
    cache.mkdir(parents=True, exist_ok=True)
    copy = cache / f"{hashlib.sha256(str(file).encode()).hexdigest()[:24]}.arrow"
    partial = copy.with_suffix(f".{os.getpid()}")
    whole = reader.read_all()  # memory-mapped, not loaded
    with pyarrow.ipc.new_stream(str(partial), schema) as out:
        for batch in whole.select(schema.names).to_batches(AT_ONCE):
            out.write_table(table_cast(pyarrow.Table.from_batches([batch]), schema))
    partial.rename(copy)
    return Dataset.from_file(str(copy))


def first_rows(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Returns the first rows of the first file with all its columns; empty for formats whose table has them all."""
    from pyarrow import parquet

    ending = files[0].suffix.lower() if files else ""
    if ending == ".parquet":
        return list(next(parquet.ParquetFile(files[0]).iter_batches(FIRST)).to_pylist())
    return list(_arrow(files[0]).read_all().slice(0, FIRST).to_pylist()) if ending == ".arrow" else []


def _unreadable(error: Exception, files: list[Path], cache: Path, field: str) -> JobError:
    if any(isinstance(each, OSError) and each.errno in FULL for each in (error, error.__cause__)):
        size = bytes_text(sum(each.stat().st_size for each in files))
        return SpecError(
            f"{field}: unpacking {files[0].parent} ({size}) to {cache} filled that disk; point JOB_SCRATCH at a "
            "larger one"
        )
    cause = str(error.__cause__ or error).splitlines()[0][:200]
    return DataError(f"{field}: {', '.join(map(str, files[:3]))} cannot be read as {files[0].suffix[1:]}: {cause}")


def _unified(schemas: dict[str, Schema], used: list[str], field: str) -> Schema:
    """Returns one type per column: the widest in any file. Raises DataError if a column has incompatible types."""
    import pyarrow

    wide = []
    for name in used:
        types = {file: _plain(schema.field(name).type) for file, schema in schemas.items()}
        fields = [pyarrow.schema([pyarrow.field(name, each)]) for each in dict.fromkeys(types.values())]
        try:
            wide.append(pyarrow.unify_schemas(fields, promote_options="permissive").field(0))
        except pyarrow.ArrowException as error:
            said = "; ".join(f"{file} has {each}" for file, each in list(types.items())[:3])
            raise DataError(f"{field}: column {name} is not of one type: {said}; convert it to one") from error
    return pyarrow.schema(wide)


def _plain(kind: DataType) -> DataType:
    """Returns the type of the values themselves: pandas stores categories as indices into a dictionary, polars stores texts as
    views."""
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        return _plain(kind.value_type)
    views = {pyarrow.string_view(): pyarrow.large_string(), pyarrow.binary_view(): pyarrow.large_binary()}
    return views.get(kind, kind)


def undecoded(rows: Dataset) -> Dataset:
    """Returns the rows as stored. Without its features, `datasets` returns the bytes of images, and one broken image spoils only
    one row."""
    from datasets import Dataset

    return Dataset(rows.data.replace_schema_metadata(None))
