"""The interface of every store. Keys are relative to the store's root."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from job.errors import DataError, Preempted


class Missing(DataError):
    """No object exists under this key."""


class Conflict(Preempted):
    """A conditional write found that another writer came first. On the next run the plan sees what that writer left."""


class Corrupt(DataError):
    """The bytes are not those that were promised, and fetching them again did not help."""


class Entry(NamedTuple):
    """One object of a listing: `size` in bytes, `modified` in seconds since 1970 by the store's own clock, `version` for
    conditions."""

    key: str
    size: int
    modified: float
    version: str


class Digest(NamedTuple):
    """A file's size in bytes and the SHA-256 of its content in hex, with the version that a listing shows where the file was
    sent or fetched."""

    size: int
    sha256: str
    version: str = ""


class Capabilities(NamedTuple):
    """What `check_writable` found. `weaker` has one sentence for each guarantee that this store cannot give."""

    conditional: bool
    checksums: bool
    deletes: bool
    """Whether deletions can also be conditional."""
    weaker: tuple[str, ...] = ()


Pieces = Callable[[], Generator[memoryview]]
"""Makes the bytes of an object from the beginning, on each call."""


class Store(Protocol):
    """Access to objects by key. Methods raise only errors of `job.errors`."""

    url: str
    """As given, for messages; never contains a credential."""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Yield every object whose key starts with `prefix`, at any depth, sorted by key."""

    def entry(self, key: str) -> Entry:
        """Look up one object directly, since a listing may lag. Raises Missing."""

    def read(self, key: str) -> bytes:
        """Read a small object whole. Raises Missing."""

    def read_piece(self, key: str, offset: int, size: int) -> bytes:
        """Read `size` bytes of an object from `offset`, fewer at its end. Raises Missing."""

    def version(self, key: str) -> str:
        """Return the version of an object, as `write` returned it. Raises Missing."""

    def age(self, key: str) -> float:
        """Seconds since the object was written, by the store's clock only. Raises Missing."""

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write a small object, whole or not at all, and return its version.

        `if_absent` requires that nothing is there, `if_match` that this version is there; otherwise raises Conflict.
        """

    def upload(self, path: Path, key: str, *, if_absent: bool = False, if_match: str | None = None) -> Digest:
        """Write a file of any size, whole or not at all, and return the digest of the bytes sent. The conditions are those of
        `write`, and hold for the moment at which the object appears."""

    def upload_pieces(
        self, make: Pieces, size: int, key: str, *, if_absent: bool = False, if_match: str | None = None
    ) -> Digest:
        """Like `upload`, for `size` bytes that are made as they are sent."""

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> Digest:
        """Download to `path`, which appears by a rename once every byte is there. Resumes what a broken call left.

        Raises Corrupt if the content does not have the given SHA-256.
        """

    def delete(self, keys: Iterable[str], *, if_match: Mapping[str, str] | None = None) -> None:
        """Delete objects; a missing one is no error. An object whose version differs from the one in `if_match` stays, and
        Conflict is raised, if the store's `Capabilities` allow it."""

    def probe(self) -> Capabilities:
        """Write, read back, overwrite and delete a small object to learn what this store really does."""

    def abort_stale(self, keys: Collection[str], older_than: float) -> int:
        """Abort uploads to these keys that began more than `older_than` seconds ago and never ended. Returns their number."""


def checked_key(key: str) -> str:
    """Return the key if it names the same place in every store and stays inside its root; otherwise raise DataError."""
    parts = key.split("/")
    if "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise DataError(f"The key {key!r} is not allowed: it has an empty part, '.', '..' or a NUL.")
    if (
        any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in parts)
        or len(key.encode("utf-8", "replace")) > 1000
    ):
        raise DataError(f"The key {key[:80]!r}… is longer than stores and file systems allow.")
    try:
        key.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"The name {key!r} is not UTF-8, so no object can have it; rename the file.") from None
    return key
