"""Reads WebDataset: tar archives in which files of one name are one row. Only headers and texts are read here; an image is read
from its place in the archive when its row is used."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from job.config.schema import DatasetSpec
from job.data.text import as_line, decoded
from job.errors import DataError
from job.runtime.staging import only_one
from job.store import Entry, open_store

IMAGES = {"jpg", "jpeg", "jpe", "png", "webp", "tif", "tiff", "bmp", "gif", "jp2", "dcm", "ppm", "pgm", "nii"}
TEXTS = {"txt", "text", "caption", "cls"}
HIDDEN = re.compile(r"(^|/)(__MACOSX/|\.[^/]*$)")
"""What macOS adds to archives, and other hidden files, by name."""
LARGEST_TEXT = 64_000_000
"""Maximum bytes of a text or a .json in an archive."""
NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
"""WebDataset's rule: a row's name ends at the first dot of the file name."""
END = 2 * tarfile.BLOCKSIZE
"""Minimum zero bytes that end an archive (POSIX.1-2024, pax)."""


def shards_to_stream(spec: DatasetSpec, path: str) -> list[Entry]:
    """Returns the shards under an `s3://` prefix if they exceed `cache_gb` and so are streamed; else none, and they are brought
    to scratch."""
    if not path.startswith("s3://") or spec.format not in ("auto", "webdataset"):
        return []
    there = [entry for entry in open_store(path).list() if entry.key.endswith(".tar")]
    return there if sum(entry.size for entry in there) > spec.cache_gb * 1e9 else []


def fetched_shards(url: str, shards: list[Entry], scratch: Path) -> Iterator[tuple[str, Path]]:
    """Yields the name of each shard in a store, and the shard, which is on scratch only while it is read."""
    here = scratch / "fetched" / "shard.tar"
    here.parent.mkdir(parents=True, exist_ok=True)
    for entry in shards:
        with only_one(here.with_name(".shard.lock"), f"{url}/{entry.key}"):  # among the jobs that share scratch
            open_store(url).download(entry.key, here)
            yield entry.key, here
            here.unlink()


def index_shards(shards: Iterable[tuple[str, Path]], field: str) -> Iterator[str]:
    """Yields one line of JSON per row: the keys of its `.json`, texts and images by extension, and all images as `image`.

    An image is `{"path", "offset", "size"}`. Raises DataError, with the byte offset, for a file that is not a plain tar archive,
    or is truncated or damaged.
    """
    for name, file in shards:
        rows: dict[str, dict[str, Any]] = {}
        names, place = set[str](), 0
        try:
            with Bounded(file) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
                for member in archive:
                    place = member.offset
                    if member.size < 0:  # it would be read again and again
                        raise tarfile.ReadError("a file has a negative size")
                    if member.issparse():  # its data does not match the offset and size in its header
                        raise tarfile.ReadError("a file is stored sparse; pack it without --sparse")
                    found = NAME.fullmatch(member.name)
                    if found and member.isfile():
                        if member.name in names:
                            raise tarfile.ReadError("a file has the name of an earlier one, which it would hide")
                        names.add(member.name)
                        _add(rows.setdefault(found[1], {}), found[2], member, archive, name)
                    archive.members = []  # type: ignore[attr-defined]  # or it would keep every header
                place = archive.offset
            with file.open("rb") as whole:
                check_end(whole, place)
        except (tarfile.TarError, OSError, EOFError, OverflowError) as error:
            raise DataError(
                f"{field}: {name} is not a plain tar archive that can be read to its end: at byte {place}: {error}; copy or "
                "create it again"
            ) from error
        for key, row in rows.items():
            pictures = [row[ending] for ending in sorted(row) if ending_of(ending) in IMAGES]
            yield as_line(row.pop(".json", {}) | row | {"__key__": key} | ({"image": pictures} if pictures else {}))


def without_texts(shard: Path) -> bool:
    """Whether a tar archive, read to its end, holds no text of a row, so that its images are those of a table elsewhere."""
    mark = shard.stat()
    return _without_texts(shard, mark.st_size, mark.st_mtime_ns)


@lru_cache(maxsize=1000)
def _without_texts(shard: Path, _size: int, _changed: int) -> bool:
    try:
        with Bounded(shard) as stream, tarfile.open(fileobj=stream, mode="r:") as opened:
            for each in opened:
                text = ending_of(each.name) in {*TEXTS, "json"} and not HIDDEN.search(each.name)
                if each.size < 0 or (text and each.isfile()):
                    return False
                opened.members = []  # type: ignore[attr-defined]  # or it would keep every header
    except (tarfile.TarError, OSError, EOFError, OverflowError):
        return False
    return True


class Bounded(io.BufferedReader):
    """A file of which no more than a text and a block are read at a time: `tarfile` reads a long name whole, whatever length its
    header gives."""

    def __init__(self, file: Path) -> None:
        super().__init__(io.FileIO(file))

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LARGEST_TEXT + tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"a header names {size / 1e6:.0f} MB of text, over {LARGEST_TEXT / 1e6:.0f}")
        return super().read(size)


def check_end(stream: BinaryIO, place: int) -> None:
    """Raises tarfile.ReadError unless the blocks at `place`, where `tarfile` found no further file, end the archive and nothing
    follows them. `tarfile` also takes a broken header for the end."""
    stream.seek(place)
    blocks = stream.read(END)
    if blocks.strip(b"\0"):
        raise tarfile.ReadError("there is neither a valid header nor the end of the archive")
    if len(blocks) < END:
        raise tarfile.ReadError(f"the {END} zero bytes that end an archive are missing, so it is truncated")
    while piece := stream.read(2**20):
        if piece.strip(b"\0"):
            raise tarfile.ReadError("more data follows the end of the archive, perhaps another archive")


def ending_of(name: str) -> str:
    """Returns the ending of a file's name in lower case: `nii` also for `.nii.gz`."""
    lower = name.lower()
    return (lower.removesuffix(".gz") if lower.endswith("nii.gz") else lower).rpartition(".")[2]


def _add(row: dict[str, Any], ending: str, member: tarfile.TarInfo, archive: tarfile.TarFile, name: str) -> None:
    if ending_of(ending) in IMAGES:
        row[ending] = {"path": name, "offset": member.offset_data, "size": member.size}
    elif ending_of(ending) in TEXTS or ending_of(ending) == "json":
        if member.size > LARGEST_TEXT:
            raise tarfile.ReadError(f"a text of {member.size / 1e6:.0f} MB, over {LARGEST_TEXT / 1e6:.0f}")
        stream = archive.extractfile(member)
        row[ending] = decoded(stream.read()) if stream else ""
        if ending_of(ending) == "json":
            try:
                row[".json"] = {**row.get(".json", {}), **json.loads(row[ending])}
                del row[ending]
            except (ValueError, TypeError, RecursionError):
                return  # it stays text, and its row lacks the values
