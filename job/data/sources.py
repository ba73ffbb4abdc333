"""Opens what a user names (folder, file, archive, bucket, Hub id) as a lazy table of rows, and says why it was read so."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from job.config.schema import DatasetSpec, PrivacySpec
from job.data.archives import unpacked
from job.data.cards import classes_noted
from job.data.cells import as_text, images_of, several
from job.data.classes import kinds_of, named
from job.data.columns import FIRST, Choose, Rows, every, first_rows, undecoded
from job.data.conversations import read_sample
from job.data.encoded import looks_like_picture
from job.data.filtered import filtered
from job.data.floats import Floats, floats_of
from job.data.hub import from_hub, not_there
from job.data.image_cache import ImageCache
from job.data.image_names import SAMPLED, beside, learned, nearest
from job.data.images import AS_IT_IS, Bounds, Files, Place, locate, path_of
from job.data.joined import Join
from job.data.layouts import TRAIN, find_rows, listed, of_split, split_of, tables_below, values_of_split
from job.data.nested import Selection, flat
from job.data.pixels import BadRow
from job.data.reading import Reading, answer_columns, choose_alike, choose_columns
from job.data.tables import LINE, as_table, read_line, read_table
from job.data.webdataset import fetched_shards, index_shards, shards_to_stream
from job.errors import DataError
from job.runtime.hub import is_hub_id
from job.runtime.staging import BUNDLE, exists, local_path, room_at

if TYPE_CHECKING:
    from datasets import Dataset


CHUNK = 1000
"""Rows read at a time to learn their split."""


@dataclass(frozen=True)
class Table:
    """Lazy rows in the columns of their format. `why` describes how they were read; paths in them are relative to `base`."""

    found: Rows
    why: str
    base: Path | str | None = None
    patients: bool = False
    """Whether the format itself says which rows belong to one patient."""
    streamed: bool = False
    """Whether each image is fetched when its row is used."""
    left_out: tuple[str, ...] = ()
    """Tables beside it that are named after other splits."""
    files: tuple[Path, ...] = ()
    """The files that hold the rows, if each is a separate table."""
    named: bool = False
    """Whether the spec names the only file, and not its folder."""
    unless: str = ""
    """What is wrong unless a column says which rows are of the split."""
    filtered: int = 0
    """Rows that `dataset.filter` and `dataset.dropna` leave out."""

    @property
    def rows(self) -> Dataset:
        return self.found.rows


@dataclass(frozen=True)
class Source:
    """A table and how it is read. `field` is the spec field that names it."""

    table: Table
    files: Files
    reading: Reading
    decided: str
    field: str
    floats: dict[str, Floats]

    def rows_at(self, places: list[int]) -> list[dict[str, Any]]:
        try:
            columns = self.table.rows[places]
        except UnicodeDecodeError as error:  # a writer may put anything into Parquet
            raise DataError(
                f"{self.field}: a text in rows {places[0]} to {places[-1]} is not UTF-8; rewrite the file"
            ) from error
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def read(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the values of a row of the table by column. Raises BadRow."""
        values = flat(read_line(row[LINE])) if LINE in row else row
        plain = {name: each.plain(values[name]) for name, each in self.floats.items() if name in values}
        classes = {name: kind for name, kind in self.table.found.classes.items() if name in self.reading.used}
        return values | plain | {name: named(values.get(name), kind, name) for name, kind in classes.items()}

    def of_split(self, spec: DatasetSpec, split: str) -> Source:
        """Selects the rows that the table's own columns put in the split, if they put any there: those that no column puts in
        another split than `train`, or those that the first column with any other split puts there. Raises DataError if the split
        is nowhere."""
        found, values, named = self, "", False
        for column in self.reading.splits:
            said = [{*cells[column]} or {""} if cells else {""} for cells in found.cells_of([column])]
            known = set[str]().union(*said)
            chosen = values_of_split(known, split, spec.eval_split, self.field == "dataset.eval_path")
            chosen |= set() if self.table.unless else {""}  # its file is named after the split
            kept = [place for place, each in enumerate(said) if each <= chosen]
            values += f"; column {column} says {listed(sorted(known - {''}))}"
            named = named or bool(kept)
            if len(kept) not in (0, len(said)):
                found = found._only(column, said, kept)
            if kept and split_of(split) != TRAIN:
                break
        if self.table.unless and not named:
            raise DataError(f"{self.field}: {self.table.unless}{values}")
        return found

    def _only(self, column: str, said: list[set[str]], kept: list[int]) -> Source:
        """Keeps rows by what the column says of each."""
        table, names = self.table, [", ".join(sorted(each - {""})) for each in said]
        left = Counter(names) - Counter(names[place] for place in kept)
        rest = listed([f"{count} rows of {value or 'no split'}" for value, count in left.most_common()])
        read = listed([value or "no split" for value in sorted({names[place] for place in kept})])
        why = f"{table.why}; {len(kept)} rows of {read} by column {column} (not read: {rest})"
        return self.selected(kept, why, left_out=(*table.left_out, rest))

    def selected(self, kept: list[int], why: str, **changes: Any) -> Source:
        """Selects rows by index; `why` then describes how the table was read, and `changes` are fields of it."""
        found = self.table.found._replace(rows=self.table.rows.select(kept))
        table = replace(self.table, found=found, why=why, **changes)
        return replace(self, table=table, decided=self.decided.replace(self.table.why, why, 1))

    def cells_of(self, columns: Iterable[str]) -> Iterator[dict[str, list[str]] | None]:
        """Yields the texts in these cells of each row, several for a list; None for a row that cannot be read."""
        names = [*columns]
        for start in range(0, len(self.table.rows), CHUNK):
            for row in self.rows_at(list(range(start, min(start + CHUNK, len(self.table.rows))))):
                cells = None
                with suppress(BadRow, RecursionError):
                    values = self.read(row)
                    cells = {name: _texts(values.get(name)) for name in names}
                yield cells

    def _every_path(self) -> Iterator[str]:
        for start in range(0, len(self.table.rows), CHUNK):
            yield from self.paths(list(range(start, min(start + CHUNK, len(self.table.rows)))))

    def paths(self, places: list[int]) -> list[str]:
        """Returns the paths of images in these rows, as the rows write them."""
        found = []
        for row in self.rows_at(places):
            with suppress(BadRow):
                values = self.read(row)
                found += [
                    path for name in self.reading.images for path in map(path_of, images_of(values, name)) if path
                ]
        return found

    def with_lookup(self, split: str) -> Source:
        """Adds how to look up the names of images, if they are no paths from the folder."""
        base, count = self.files.base, len(self.table.rows)
        if not isinstance(base, Path) or self.table.patients or self.table.streamed:
            return self
        names = self.paths(sorted({place * count // SAMPLED for place in range(SAMPLED)}))
        named = split_of(self.table.files[0].relative_to(base).as_posix()) if self.table.files else None
        lookup = learned(base, names, named := named or split_of(split))
        if lookup is None and self.table.named and not any((base / name).is_file() for name in names):
            lookup = beside(base, names, named)
        if lookup is None:
            return self
        if lookup.dropped != 0:
            lookup = lookup.without_shared(self._every_path())
        decided = f"{self.decided} found in {lookup.folder(names) or lookup.tree.base}"
        return replace(self, files=self.files._replace(base=lookup.tree.base, lookup=lookup), decided=decided)

    def tried(self, place: int) -> str:
        """Describes where the first image of a row was looked for, and what is near."""
        base, names = self.files.base, self.paths([place])
        if not isinstance(base, Path) or not names:
            return ""
        first = next((name for name in names if not (base / name).is_file()), names[0])
        return f"The first is {base / first}, and the nearest that exists is {nearest(base, first)}"

    def other_pictures(self) -> list[str]:
        """Returns the columns that look like images but that the spec does not read as images."""
        found: dict[str, None] = {}
        some = first_rows(self.table.files) or self.rows_at(list(range(min(FIRST, len(self.table.rows)))))
        for row in some:
            with suppress(BadRow):
                values = self.read(row)
                found |= dict.fromkeys(name for name, value in values.items() if looks_like_picture(value))
        return [name for name in found if name not in self.reading.images]

    def named_files(self, spec: DatasetSpec, *folders: Path) -> list[set[str]]:
        """Returns, for each folder, the files below it that good rows name, relative to it."""
        found: dict[Path, set[str]] = {folder.absolute(): set() for folder in folders}
        for row in self.table.rows:
            with suppress(BadRow):
                for value in read_sample(self.read(row), spec, self.reading).images:
                    place = locate(value, self.files)
                    file = Path(place.name).absolute() if isinstance(place, Place) else Path("/")
                    for root, names in found.items():
                        if root in file.parents and file.is_file():
                            names.add(str(file.relative_to(root)))
        return [*found.values()]


def _texts(cell: Any) -> list[str]:
    """Returns the texts in a cell, several for a list; none for values nested too deeply."""
    try:
        return several(cell, None) or [as_text(cell)]
    except RecursionError:
        return []


def open_source(
    spec: DatasetSpec,
    path: str,
    split: str,
    scratch: Path,
    field: str = "dataset.path",
    bounds: Bounds = AS_IT_IS,
    also: Mapping[str, str] = MappingProxyType({}),
    privacy: PrivacySpec = PrivacySpec(),  # noqa: B008 - it is frozen
) -> Source:
    """Opens the rows at `path` without decoding images, with the columns in `also`, keyed by the fields that need them.

    Raises DataError naming `field` if there is nothing to read.
    """

    def choose(tables: dict[str, tuple[str, ...]]) -> Iterable[str]:
        reading = choose_alike(tables, spec, field, also)
        return reading.used | set.intersection({*reading.splits}, *map(set, tables.values()))

    def used(columns: Iterable[str]) -> frozenset[str]:
        reading = choose_columns(columns, spec, field, also)
        return reading.used | {*reading.splits}

    join = Join(spec.join, answer_columns(spec), used) if spec.join else None
    table = _open(spec, path, split, scratch, field, choose, join)
    if join and not any(note.startswith("joined ") for note in table.found.notes):
        raise DataError(f"{field}: dataset.join joins CSV, JSON and Excel tables, and this is {table.why}")
    reading = choose_columns(table.found.columns, spec, field, also)
    bundled = scratch / BUNDLE / "images"
    fetched = bundled if bundled.exists() else scratch / "fetched" / "images"
    way = hashlib.sha256(f"{bounds} {spec.dicom} {privacy}".encode()).hexdigest()[:16]
    free = room_at(scratch)
    room = int(spec.cache_gb * 1e9)
    room = room if free is None else min(room, free // 2)  # the rest is for what the job cannot do without
    cache = ImageCache(scratch / "cache" / "pictures" / way, room) if any(bounds) else None
    files = Files(table.base, fetched, cache, bounds, privacy, tuple(host.lower() for host in spec.image_hosts))
    what = f"conversations in {reading.messages}" if reading.messages else f"answers in {reading.answer}"
    if spec.answer and not reading.messages:
        what = "answers by template"
    images = f"images in {', '.join(reading.images)}" if reading.images else "no images"
    source = Source(table, files, reading, f"{table.why}; {what}, {images}", field, table.found.floats)
    return filtered(source.of_split(spec, split), spec).with_lookup(split)


def open_whole(path: str, scratch: Path, field: str) -> tuple[Source, dict[str, tuple[str, ...]]]:
    """Opens the training rows at `path` with all columns, before anything is known of them, and returns the columns of each
    file too; those of DICOM files and archives are not listed. Raises DataError."""
    tables = dict[str, tuple[str, ...]]()

    def choose(found: dict[str, tuple[str, ...]]) -> Iterable[str]:
        tables.update(found)
        return every(found)

    table = _open(DatasetSpec(path=path), path, "train", scratch, field, choose, None)
    return Source(table, Files(table.base), Reading((), ""), table.why, field, table.found.floats), tables


def _open(
    spec: DatasetSpec, path: str, split: str, scratch: Path, field: str, choose: Choose, join: Join | None
) -> Table:
    cache, held_out = scratch / "cache" / "datasets", field == "dataset.eval_path"
    streamed = [] if (scratch / BUNDLE).exists() else shards_to_stream(spec, path)
    if streamed:
        named = set(of_split((shard.key for shard in streamed), split, held_out))
        shards = [shard for shard in streamed if shard.key in named]
        if not shards:
            raise DataError(
                f"{field}: none of the {len(streamed)} .tar files under {path} is named after the split {split}"
            )
        names = listed([shard.key for shard in shards])
        why = f"webdataset: {names}, read from their store because they exceed cache_gb {spec.cache_gb:g}"
        lines = index_shards(fetched_shards(path, shards, scratch), field)
        return Table(as_table({path: lines}, cache, f"{path} {split}", field), why, path, streamed=True)
    here = local_path(path, scratch, field)
    if not exists(here):
        if spec.format in ("auto", "hub") and is_hub_id(path):
            rows = from_hub(spec, path, split, cache, field)
            schema = rows.features.arrow_schema
            known = Rows(rows := undecoded(rows), tuple(rows.column_names), kinds_of(schema), floats_of(rows))
            return Table(known, f"hub dataset {' '.join(filter(None, [path, spec.name]))}, split {split}")
        raise not_there(path, field)
    if here.suffix.lower() == ".zip":
        here = unpacked(here, scratch, field)
    found = find_rows(spec, here, split, field, held_out)
    kind, chosen, why = found.kind, found.files, found.why
    base: Path | str = chosen[0].parent if kind == "imagefolder" or here.is_file() else here
    if kind == "webdataset":
        lines = index_shards(((str(file.relative_to(base)), file) for file in chosen), field)
        return Table(as_table({str(here): lines}, cache, f"{here} {split}", field), why, base)
    if path.startswith("s3://") and here.is_file():
        base = path.rpartition("/")[0]  # what lies beside it was not fetched with it
    if kind == "dicom":
        from job.data.dicom_studies import index_studies

        tables = [here / spec.dicom.reports] if spec.dicom.reports else tables_below(here)
        if len(tables) != 1 or not tables[0].is_file():
            raise DataError(
                f"{field}: {here} holds DICOM files and {len(tables)} tables; name the table of reports in dataset.dicom.reports"
            )
        reports = read_table(tables, cache, field)
        lines, why = index_studies(spec, here, chosen, reports.rows, field)
        rows = as_table({str(here): lines}, cache, f"{here} dicom", field)
        return Table(rows._replace(classes=reports.classes), f"{why}; reports in {tables[0].name}", here, patients=True)
    wanted = Selection(split, held_out, frozenset(answer_columns(spec)))
    rows = read_table(chosen, cache, field, choose, wanted, join)
    why = "; ".join([why, *rows.notes])
    if here.is_dir():
        rows = rows._replace(classes={**classes_noted(here, spec.name), **rows.classes})
    unless = "" if rows.of_split else found.unless
    return Table(rows, why, base, left_out=found.left_out, files=tuple(chosen), named=here.is_file(), unless=unless)
