"""What a user names (folder, file, archive, bucket, hub id), as a lazy table of rows, and why it was read so."""

from __future__ import annotations

import hashlib
import re
import shutil
import zipfile
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.data.images import AS_IT_IS, BadRow, Bounds, Files, Place, locate
from job.data.rows import Reading, choose_columns, read_sample
from job.data.shards import fetched_shards, index_shards, shards_to_stream
from job.data.shelf import Shelf
from job.data.tables import LINE, as_table, columns_of, from_hub, read_line, read_table, undecoded
from job.errors import DataError
from job.record import bytes_text
from job.scratch import free_bytes
from job.spec import DatasetSpec
from job.stage_in import BUNDLE, local_path

if TYPE_CHECKING:
    from datasets import Dataset

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
KINDS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".tar": "webdataset",
}
TRAIN = "train"
"""The split that is everything where no file is named after a split. For another, everything would be a leak."""
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+|[\w-]+")


@dataclass(frozen=True)
class Table:
    """Lazy rows as some format has them. `why` says in words how they were read; paths in them start from `base`."""

    rows: Dataset
    why: str
    base: Path | str | None = None
    patients: bool = False
    """Whether the format itself says which rows are of one patient."""
    streamed: bool = False
    """Whether each image is fetched when its row is used."""


@dataclass(frozen=True)
class Source:
    """A table, and how it is read: `columns` are what `read` gives of a row. `field` of the spec names it."""

    table: Table
    columns: tuple[str, ...]
    files: Files
    reading: Reading
    decided: str
    field: str

    def rows_at(self, places: list[int]) -> list[dict[str, Any]]:
        try:
            columns = self.table.rows[places]
        except UnicodeDecodeError as error:  # a writer may put anything into parquet
            raise DataError(
                f"{self.field}: a text in rows {places[0]} to {places[-1]} is not UTF-8; write the file anew"
            ) from error
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def read(self, row: dict[str, Any]) -> dict[str, Any]:
        """Values by column of a row of the table. Raises BadRow."""
        return read_line(row[LINE]) if LINE in row else row

    def named_files(self, spec: DatasetSpec, folder: Path) -> set[str]:
        """Files below `folder` that good rows name, relative to it."""
        found, root = set[str](), folder.absolute()
        for row in self.table.rows:
            with suppress(BadRow):
                for value in read_sample(self.read(row), spec, self.reading).images:
                    place = locate(value, self.files)
                    if isinstance(place, Place) and Path(place.name).is_file() and root in Path(place.name).parents:
                        found.add(str(Path(place.name).relative_to(root)))
        return found


def open_source(
    spec: DatasetSpec, path: str, split: str, scratch: Path, field: str = "dataset.path", bounds: Bounds = AS_IT_IS
) -> Source:
    """The rows at `path`, images not decoded. Raises DataError naming `field` when there is nothing to read."""
    table = _open(spec, path, split, scratch, field)
    columns = columns_of(table.rows, f"{field}: {path}")
    reading = choose_columns(columns, spec, field)
    bundled = scratch / BUNDLE / "images"
    fetched = bundled if bundled.exists() else scratch / "fetched" / "images"
    way = hashlib.sha256(f"{bounds} {spec.dicom}".encode()).hexdigest()[:16]
    room = min(int(spec.cache_gb * 1e9), free_bytes(scratch) // 2)  # the rest is for what the job cannot do without
    shelf = Shelf(scratch / "cache" / "pictures" / way, room) if any(bounds) else None
    files = Files(table.base, fetched, shelf, bounds)
    what = f"conversations in {reading.messages}" if reading.messages else f"answers in {reading.answer}"
    if spec.answer and not reading.messages:
        what = "answers by template"
    images = f"images in {', '.join(reading.images)}" if reading.images else "no images"
    return Source(table, columns, files, reading, f"{table.why}; {what}, {images}", field)


def _open(spec: DatasetSpec, path: str, split: str, scratch: Path, field: str) -> Table:
    cache = scratch / "cache" / "datasets"
    streamed = [] if (scratch / BUNDLE).exists() else shards_to_stream(spec, path)
    if streamed:
        shards = [shard for shard in streamed if _named(split, shard.key)] or streamed * (split == TRAIN)
        why = f"webdataset: {len(shards)} .tar file(s), read from their store since they are over cache_gb {spec.cache_gb:g}"
        lines = index_shards(fetched_shards(path, shards, scratch), field)
        return Table(as_table(lines, cache, f"{path} {split}", field), why, path, streamed=True)
    here = local_path(path, scratch, field)
    if not here.exists():
        if spec.format in ("auto", "hub") and HUB_ID.fullmatch(path):
            return Table(undecoded(from_hub(spec, path, split, cache, field)), "hub dataset")
        raise DataError(f"{field}: {path} does not exist")
    if here.suffix.lower() == ".zip":
        here = _unpacked(here, scratch, field)
    files = [here] if here.is_file() else _files(here)
    kind, chosen, why = _decide(spec, here, files, split, field)
    base: Path | str = chosen[0].parent if kind == "imagefolder" or here.is_file() else here
    if kind == "webdataset":
        lines = index_shards(((str(file.relative_to(base)), file) for file in chosen), field)
        return Table(as_table(lines, cache, f"{here} {split}", field), why, base)
    if path.startswith("s3://") and here.is_file():
        base = path.rpartition("/")[0]  # what lies beside it was not fetched with it
    if kind == "dicom":
        from job.data.studies import index_studies

        tables = [here / spec.dicom.reports] if spec.dicom.reports else [f for f in files if f.suffix.lower() in KINDS]
        if len(tables) != 1 or not tables[0].is_file():
            raise DataError(
                f"{field}: {here} holds DICOM files and {len(tables)} tables; name the reports' in dataset.dicom.reports"
            )
        lines, why = index_studies(spec, here, chosen, read_table(tables, cache, field), field)
        return Table(as_table(lines, cache, f"{here} dicom", field), why, here, patients=True)
    return Table(read_table(chosen, cache, field), why, base)


def _decide(spec: DatasetSpec, here: Path, files: list[Path], split: str, field: str) -> tuple[str, list[Path], str]:
    """The format, the files that make it up, and the reason in words."""
    found = Counter(KINDS[file.suffix.lower()] for file in files if file.suffix.lower() in KINDS)
    asked = spec.format
    if asked in ("auto", "imagefolder") and here.is_dir():
        for metadata in (
            here / sub / name for sub in ((split, ".") if split == TRAIN else (split,)) for name in METADATA
        ):
            if metadata.is_file():
                return "imagefolder", [metadata], f"image folder: it holds {metadata.relative_to(here)}"
    others = [file for file in files if file.suffix.lower() not in KINDS]
    if asked == "dicom" or (asked == "auto" and not found["webdataset"] and any(map(_is_dicom, others[:200]))):
        return "dicom", others, ""
    kind = asked if asked not in ("auto", "hub") else "webdataset" if found["webdataset"] else next(iter(found), "")
    those = [file for file in files if kind and KINDS.get(file.suffix.lower()) == kind]
    root = here if here.is_dir() else here.parent
    chosen = [file for file in those if _named(split, str(file.relative_to(root)))] or those * (split == TRAIN)
    if not chosen:
        there = Counter(file.suffix.lower() or "no ending" for file in files).most_common(5)
        listed = ", ".join(f"{count} × {suffix}" for suffix, count in there) or "nothing"
        wanted = "metadata.jsonl or .csv, .jsonl, .json, .csv, .parquet, .tar, DICOM, or a .zip by its own name"
        wanted = {"auto": wanted, "imagefolder": ", ".join(METADATA)}.get(asked, asked)
        after = "" if split == TRAIN else f", named after the split {split}"
        raise DataError(f"{field}: {here} holds {listed}; wanted is {wanted}{after}")
    if len(chosen) == 1 and chosen[0].name in METADATA:
        return "imagefolder", chosen, f"image folder: it holds {chosen[0].relative_to(root)}"
    why = f"{kind}: {len(chosen)} {chosen[0].suffix} file(s)"
    beside = ", ".join(f"{count} {name}" for name, count in found.items() if name != kind)
    return kind, chosen, f"{why} ({beside} beside them not read)" if beside else why


def _unpacked(archive: Path, scratch: Path, field: str) -> Path:
    """The folder that a zip archive holds, on scratch. Names that lead out of it are made harmless by `zipfile`."""
    mark = archive.stat()
    name = hashlib.sha256(f"{archive.resolve()} {mark.st_size} {mark.st_mtime_ns}".encode()).hexdigest()[:24]
    folder, partial = scratch / "fetched" / name, scratch / "fetched" / f"{name}.partial"
    if not folder.exists():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            with zipfile.ZipFile(archive) as packed:
                need = sum(member.file_size for member in packed.infolist())
                if need > free_bytes(scratch):
                    raise DataError(f"{field}: {archive} unpacks to {bytes_text(need)}, more than scratch has room for")
                packed.extractall(partial)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:  # the last: encrypted
            raise DataError(f"{field}: {archive} cannot be unpacked: {error}") from error
        partial.rename(folder)
    inside = [path for path in folder.iterdir() if path.name not in ("__MACOSX", ".DS_Store")]
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def _named(split: str, name: str) -> bool:
    """Whether a file is named after the split. When any is, the others are not read."""
    return re.search(rf"(^|[/_.-]){re.escape(split)}[/_.-]", name) is not None


def _is_dicom(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False
