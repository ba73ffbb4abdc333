"""What every store can do, in the few words the rest of the job uses. Keys are relative to the store's root."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from job.errors import DataError, Preempted


class Missing(DataError):
    """There is no object under this key."""


class Conflict(Preempted):
    """A conditional write found that another writer had been there first. Run again, and the plan sees what it left."""


class Corrupt(DataError):
    """The bytes are not the bytes that were promised, and fetching them again did not help."""


class Entry(NamedTuple):
    """One object of a listing: `size` in bytes, `modified` in seconds since 1970 by the store's own clock."""

    key: str
    size: int
    modified: float


class Digest(NamedTuple):
    """What a file is: its size in bytes and the SHA-256 of its content, in hex."""

    size: int
    sha256: str


class Capabilities(NamedTuple):
    """What `check_writable` found. `weaker` holds one sentence for each guarantee that this store cannot give."""

    conditional: bool
    checksums: bool
    weaker: tuple[str, ...] = ()


class Store(Protocol):
    """One door to objects. Every method raises only errors of `job.errors`."""

    url: str
    """As it was given, for messages; it never holds a credential."""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Every object whose key starts with `prefix`, whatever its depth, sorted by key."""

    def read(self, key: str) -> bytes:
        """A small object, whole. Raises Missing."""

    def read_piece(self, key: str, offset: int, size: int) -> bytes:
        """`size` bytes of an object from `offset` on; fewer where it ends. Raises Missing."""

    def version(self, key: str) -> str:
        """The version of an object, as `write` returned it. Raises Missing."""

    def age(self, key: str) -> float:
        """Seconds since the object was written, by the store's clock alone. Raises Missing."""

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write a small object, whole or not at all, and return its version.

        `if_absent` demands that nothing is there, `if_match` that the version there is this one; else raises Conflict.
        """

    def upload(self, path: Path, key: str) -> Digest:
        """Write a file of any size, whole or not at all, and return the digest of the bytes that were sent."""

    def upload_pieces(self, pieces: Iterator[memoryview], size: int, key: str) -> Digest:
        """The same for `size` bytes that are made as they are sent."""

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> Digest:
        """Fetch into `path`, which appears by a rename when every byte is there. What a broken call left is used.

        Raises Corrupt when the content does not have the SHA-256 given.
        """

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; one that is not there is no error."""

    def probe(self) -> Capabilities:
        """Write, read back, overwrite and delete a small object, to learn what this store really does."""

    def abort_stale(self, prefix: str, older_than: float) -> int:
        """Give up uploads under `prefix` that were begun more than `older_than` seconds ago and never ended."""


def checked_key(key: str) -> str:
    """The key, if it is one that names the same place in every store and stays inside its root; else DataError."""
    parts = key.split("/")
    if "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise DataError(f"The key {key!r} cannot be used: an empty part, '.', '..' or a NUL would leave its folder.")
    if (
        any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in parts)
        or len(key.encode("utf-8", "replace")) > 1000
    ):
        raise DataError(f"The key {key[:80]!r}… is longer than stores and file systems take.")
    try:
        key.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"The name {key!r} is not UTF-8, so no object can carry it; rename the file.") from None
    return key
