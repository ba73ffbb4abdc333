"""WebDataset: tar archives whose files of one name are one row. Only their headers and texts are read here; an image is read
from its place in the archive when its row is used."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from job.errors import DataError
from job.spec import DatasetSpec
from job.store import Entry, open_store

IMAGES = {"jpg", "jpeg", "jpe", "png", "webp", "tif", "tiff", "bmp", "gif", "jp2", "dcm", "ppm", "pgm"}
TEXTS = {"txt", "text", "caption", "cls"}
NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
"""WebDataset's rule: a row's name ends at the first dot of the file's."""


def shards_to_stream(spec: DatasetSpec, path: str) -> list[Entry]:
    """The shards under an `s3://` prefix, when they are more than `cache_gb` and so stay there; else none: what fits is brought
    to scratch."""
    if not path.startswith("s3://") or spec.format not in ("auto", "webdataset"):
        return []
    there = [entry for entry in open_store(path).list() if entry.key.endswith(".tar")]
    return there if sum(entry.size for entry in there) > spec.cache_gb * 1e9 else []


def index_remote_shards(url: str, shards: list[Entry], scratch: Path, field: str) -> Iterator[dict[str, Any]]:
    """As `index_shards`, of shards in a store: each is on scratch only while it is looked through."""
    store = open_store(url)
    here = scratch / "fetched" / "shard.tar"
    here.parent.mkdir(parents=True, exist_ok=True)
    for entry in shards:
        store.download(entry.key, here)
        try:
            yield from _rows(here, field, f"{url.rstrip('/')}/{entry.key}")
        finally:
            here.unlink()


def index_shards(files: list[Path], field: str) -> Iterator[dict[str, Any]]:
    """A row for each name: the keys of its `.json`; texts by their ending; images by theirs, and all of them as `image`.

    An image is `{"file", "offset", "size"}`. Raises DataError for a file that is no plain tar archive, and when there are
    no rows.
    """
    count = 0
    for file in files:
        for row in _rows(file, field, str(file)):
            count += 1
            yield row
    if not count:
        raise DataError(f"{field}: {files[0]} holds no rows as WebDataset has them (0001.jpg, 0001.txt, 0001.json)")


def _rows(file: Path, field: str, name: str) -> Iterator[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                found = NAME.fullmatch(member.name)
                if found and member.isfile():
                    row = rows.setdefault(found[1], {"__key__": found[1]})
                    _add(row, found[2], member, archive, name)
                archive.members = []  # type: ignore[attr-defined]  # or it would keep every header
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{field}: {name} is not a plain tar archive that can be read to its end: {error}") from error
    for row in rows.values():
        pictures = [value for _, value in sorted(row.items()) if isinstance(value, dict) and "offset" in value]
        yield row | {"image": pictures} if pictures else row


def _add(row: dict[str, Any], ending: str, member: tarfile.TarInfo, archive: tarfile.TarFile, name: str) -> None:
    kind = ending.rpartition(".")[2].lower()
    if kind in IMAGES:
        row[ending] = {"file": name, "offset": member.offset_data, "size": member.size}
    elif kind in TEXTS or kind == "json":
        stream = archive.extractfile(member)
        text = stream.read().decode("utf-8", "replace") if stream else ""
        if kind == "json":
            try:
                found = json.loads(text)
            except ValueError:
                found = None
            row |= found if isinstance(found, dict) else {ending: text}
        else:
            row[ending] = text
