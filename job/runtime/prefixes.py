"""Fetches `s3://` prefixes of any number of objects: one listing, written as it arrives, and only what is not there yet."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from job.store import Store, download_files
from job.store.disk import disk


class Listing(NamedTuple):
    """The keys under a prefix and their bytes altogether. `file` has a line of JSON for each object."""

    file: Path
    keys: set[str]
    size: int


def write_listing(store: Store, file: Path) -> Listing:
    keys, size = set[str](), 0
    with disk(file), file.open("w") as out:
        for entry in store.list():
            out.write(f"{json.dumps(entry)}\n")
            keys.add(entry.key)
            size += entry.size
    return Listing(file, keys, size)


class Fetched(NamedTuple):
    """What was fetched to a folder: `whole` is the listing of all that is there, `partly` has the line of each object that has
    come, so that an attempt that was stopped is continued."""

    whole: Path
    partly: Path

    def is_as(self, listing: Listing) -> bool:
        return self.whole.exists() and filecmp.cmp(self.whole, listing.file, shallow=False)

    def begin(self) -> None:
        if self.whole.exists():
            self.whole.replace(self.partly)

    def complete(self, listing: Listing) -> None:
        listing.file.replace(self.whole)
        self.partly.unlink(missing_ok=True)


def fetch_listed(store: Store, listing: Listing, fetched: Fetched, folder: Path) -> set[str]:
    """Fetches what is listed to `folder`, except what came earlier and is unchanged. Returns the keys that have gone since."""
    done, gone = set[int](), set[str]()
    with disk(folder):
        if fetched.partly.exists():
            with fetched.partly.open() as earlier:
                done = set(map(hash, earlier))
    lines = dict[str, str]()
    with disk(folder), fetched.partly.open("a") as journal:
        for key, digest in download_files(store, _new(listing.file, done, folder, lines.__setitem__), folder):
            if digest is None:
                gone.add(key)
            journal.write(lines.pop(key))
    return gone


def _new(file: Path, done: set[int], folder: Path, remember: Callable[[str, str], None]) -> Iterator[str]:
    with file.open() as lines:
        for line in lines:
            key, size, *_ = json.loads(line)
            there = folder / key
            if hash(line) in done and there.is_file() and there.stat().st_size == size:
                continue
            remember(key, line)
            yield key
