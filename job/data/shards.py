"""WebDataset: tar archives whose files of one name are one row. Only their headers and texts are read here; an image is read
from its place in the archive when its row is used."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable, Iterator
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


def fetched_shards(url: str, shards: list[Entry], scratch: Path) -> Iterator[tuple[str, Path]]:
    """The name of each shard in a store, and the shard, which is on scratch only while it is looked through."""
    here = scratch / "fetched" / "shard.tar"
    here.parent.mkdir(parents=True, exist_ok=True)
    for entry in shards:
        open_store(url).download(entry.key, here)
        yield entry.key, here
        here.unlink()


def index_shards(shards: Iterable[tuple[str, Path]], field: str) -> Iterator[str]:
    """A line of JSON for each row: the keys of its `.json`; texts by their ending; images by theirs, and all of them as `image`.

    An image is `{"path", "offset", "size"}`. Raises DataError for a file that is no plain tar archive.
    """
    for name, file in shards:
        rows: dict[str, dict[str, Any]] = {}
        try:
            with tarfile.open(file, "r:") as archive:
                for member in archive:
                    found = NAME.fullmatch(member.name)
                    if found and member.isfile():
                        _add(rows.setdefault(found[1], {}), found[2], member, archive, name)
                    archive.members = []  # type: ignore[attr-defined]  # or it would keep every header
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(
                f"{field}: {name} is not a plain tar archive that can be read to its end: {error}"
            ) from error
        for key, row in rows.items():
            pictures = [row[ending] for ending in sorted(row) if _kind(ending) in IMAGES]
            yield json.dumps(row.pop(".json", {}) | row | {"__key__": key} | ({"image": pictures} if pictures else {}))


def _kind(ending: str) -> str:
    return ending.rpartition(".")[2].lower()


def _add(row: dict[str, Any], ending: str, member: tarfile.TarInfo, archive: tarfile.TarFile, name: str) -> None:
    if _kind(ending) in IMAGES:
        row[ending] = {"path": name, "offset": member.offset_data, "size": member.size}
    elif _kind(ending) in TEXTS or _kind(ending) == "json":
        stream = archive.extractfile(member)
        row[ending] = stream.read().decode("utf-8", "replace") if stream else ""
        if _kind(ending) == "json":
            try:
                row[".json"] = {**row.get(".json", {}), **json.loads(row[ending])}
                del row[ending]
            except (ValueError, TypeError, RecursionError):
                return  # it stays text, and its row lacks what it should have said
