"""Stores objects in a folder (Lustre, NFS, NVMe): temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from job.errors import DataError, SpecError, Unavailable
from job.store.disk import copy, disk, make_folder, partial_name, pieces_of, sync_folder, written_early
from job.store.protocol import Capabilities, Conflict, Corrupt, Digest, Entry, Missing, Pieces, checked_key

LOCK_SECONDS = 60.0
"""Longest wait for a lock, which is held only while a small file is written and renamed."""
_OURS = re.compile(r"^\..*\.([0-9a-f]{12}\.part|lock)$")


def _unless_gone(error: OSError) -> None:
    """Ignore a missing folder, which holds nothing; raise for one that cannot be read, which may hold anything."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _status(path: Path) -> os.stat_result:
    """Stat the target of a link, or the link itself if its target is gone."""
    try:
        return path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return path.lstat()
        raise


class LocalStore:
    """Objects as files under a root folder."""

    def __init__(self, url: str, root: Path) -> None:
        self.url = url
        self.root = root

    def list(self, prefix: str = "") -> Iterator[Entry]:
        start = self.root / prefix.rpartition("/")[0] if "/" in prefix else self.root
        found: list[Entry] = []
        with disk(start):
            for folder, inner, names in os.walk(start, onerror=_unless_gone):
                # A link to a folder is listed itself; its target is not searched.
                for name in (*names, *(name for name in inner if (Path(folder) / name).is_symlink())):
                    key = (Path(folder) / name).relative_to(self.root).as_posix()
                    if key.startswith(prefix) and not _OURS.match(name):
                        with contextlib.suppress(FileNotFoundError):
                            status = _status(Path(folder) / name)
                            found.append(Entry(key, status.st_size, status.st_mtime, _mark(status)))
        yield from sorted(found)

    def entry(self, key: str) -> Entry:
        path = self._path(key)
        with disk(path):
            try:
                status = _status(path)
            except (FileNotFoundError, NotADirectoryError):
                status = None
        if status is None or stat.S_ISDIR(status.st_mode):
            raise Missing(f"There is no {key} in {self.url}.")
        return Entry(key, status.st_size, status.st_mtime, _mark(status))

    def read(self, key: str) -> bytes:
        path = self._path(key)
        with disk(path):
            try:
                return path.read_bytes()
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                raise Missing(f"There is no {key} in {self.url}.") from None

    def read_piece(self, key: str, offset: int, size: int) -> bytes:
        path = self._path(key)
        with disk(path):
            try:
                with path.open("rb") as stream:
                    stream.seek(offset)
                    return stream.read(size)
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                raise Missing(f"There is no {key} in {self.url}.") from None

    def version(self, key: str) -> str:
        path = self._path(key)
        with disk(path):
            try:
                return _sha256(path)
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                raise Missing(f"There is no {key} in {self.url}.") from None

    def age(self, key: str) -> float:
        """Touch a file beside the object to tell the time: on a network folder both times then come from the server."""
        path = self._path(key)
        with disk(path):
            with self._temporary(path) as (stream, temporary):
                stream.write(b"now")
                stream.flush()
                os.utime(stream.fileno())
                now = temporary.stat().st_mtime
            try:
                return now - path.stat().st_mtime
            except FileNotFoundError:
                raise Missing(f"There is no {key} in {self.url}.") from None

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        path = self._path(key)
        with disk(path), self._temporary(path) as (stream, temporary):
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            self._appear(temporary, path, key, if_absent, if_match)
        return hashlib.sha256(data).hexdigest()

    def upload(self, path: Path, key: str, *, if_absent: bool = False, if_match: str | None = None) -> Digest:
        with disk(path), path.open("rb", buffering=0) as source:
            size = os.fstat(source.fileno()).st_size
            return self.upload_pieces(lambda: pieces_of(source), size, key, if_absent=if_absent, if_match=if_match)

    def upload_pieces(
        self, make: Pieces, size: int, key: str, *, if_absent: bool = False, if_match: str | None = None
    ) -> Digest:
        target = self._path(key)
        with disk(target), self._temporary(target) as (stream, temporary), contextlib.closing(make()) as pieces:
            digest = copy(written_early(pieces, stream), stream)
            if digest.size != size:
                raise DataError(f"The content of {key} should have {size} bytes, and has {digest.size}.")
            os.fsync(stream.fileno())
            version = _mark(os.fstat(stream.fileno()))
            self._appear(temporary, target, key, if_absent, if_match)
        return digest._replace(version=version)

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> Digest:
        source_path = self._path(key)
        with disk(path), contextlib.ExitStack() as stack:
            try:
                source = stack.enter_context(source_path.open("rb", buffering=0))
            except (FileNotFoundError, NotADirectoryError):
                raise Missing(f"There is no {key} in {self.url}.") from None
            stream, temporary = stack.enter_context(self._temporary(path))
            digest = copy(pieces_of(source), stream)
            if sha256 is not None and digest.sha256 != sha256:
                raise Corrupt(f"{key} in {self.url} has SHA-256 {digest.sha256}, not {sha256} as expected.")
            stream.flush()
            temporary.replace(path)
            return digest._replace(version=_mark(os.fstat(source.fileno())))

    def delete(self, keys: Iterable[str], *, if_match: Mapping[str, str] | None = None) -> None:
        for key in keys:
            path = self._path(key)
            with disk(path):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    if version := (if_match or {}).get(key):
                        path.lstat()  # else a lock would be created where nothing exists
                        with self._locked(path):
                            self._refuse_changed(path, key, version)
                            path.unlink()
                    else:
                        path.unlink()
                with contextlib.suppress(OSError):
                    if _lock_of(path).lstat().st_size == 0:  # ours are empty
                        _lock_of(path).unlink()
                with contextlib.suppress(OSError):  # a folder that is not empty stays
                    for folder in path.parents:
                        if folder == self.root or self.root not in folder.parents:
                            break
                        folder.rmdir()

    def probe(self) -> Capabilities:
        key = f"probe-{secrets.token_hex(6)}"
        try:
            version = self.write(key, b"a", if_absent=True)
            self.write(key, b"b", if_match=version)
            try:
                self.write(key, b"c", if_absent=True)
                conditional = False
            except Conflict:
                conditional = self.read(key) == b"b"
        except Unavailable as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EROFS:  # from the start
                raise SpecError(f"{self.url} is on a read-only file system; choose another folder.") from error
            raise
        finally:
            self.delete([key])
        weaker = () if conditional else (f"{self.url} has no exclusive create, so two writers may collide.",)
        return Capabilities(conditional, checksums=True, deletes=True, weaker=weaker)

    def abort_stale(self, keys: Collection[str], older_than: float) -> int:
        """Remove temporary files of killed writers."""
        count = 0
        now = None
        for path in map(self._path, sorted(keys)):
            begun = re.compile(re.escape(partial_name(path.name, "").removesuffix(".part")) + r"[0-9a-f]{12}\.part")
            with disk(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
                for left in [each for each in path.parent.iterdir() if begun.fullmatch(each.name)]:
                    if now is None:
                        with self._temporary(path) as (_, temporary):
                            now = temporary.stat().st_mtime
                    with contextlib.suppress(FileNotFoundError):
                        if now - left.lstat().st_mtime >= older_than:
                            left.unlink()
                            count += 1
        return count

    def _path(self, key: str) -> Path:
        return self.root / checked_key(key)

    @contextlib.contextmanager
    def _temporary(self, target: Path) -> Iterator[tuple[BinaryIO, Path]]:
        make_folder(target.parent)
        temporary = target.parent / partial_name(target.name, secrets.token_hex(6))
        try:
            with temporary.open("xb") as stream:
                yield stream, temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _appear(self, temporary: Path, path: Path, key: str, if_absent: bool, if_match: str | None) -> None:
        """Give a complete file its name, if what is there may be replaced."""
        if if_absent:
            self._link(temporary, path, key)
        elif if_match is not None:
            with self._locked(path):
                try:
                    self._refuse_changed(path, key, if_match)
                except (FileNotFoundError, NotADirectoryError):
                    raise Conflict(f"Another writer deleted {key} in {self.url}.") from None
                temporary.replace(path)
        else:
            temporary.replace(path)
        sync_folder(path.parent)

    def _refuse_changed(self, path: Path, key: str, version: str) -> None:
        """Raise Conflict if a file has another version. Listings and uploads identify a file by time and size, `write` and
        `version` by content: a lease is rewritten at the same size more often than clocks tick, and gigabytes are not read
        only to be replaced."""
        if (_mark(_status(path)) if "-" in version else _sha256(path)) != version:
            raise Conflict(f"Another writer changed {key} in {self.url}.")

    def _link(self, temporary: Path, path: Path, key: str) -> None:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise Conflict(f"{key} is already in {self.url}: another writer put it there.") from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            # No hard links here (some FUSE and SMB mounts): claim the name first, then rename over it.
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                raise Conflict(f"{key} is already in {self.url}: another writer put it there.") from None
            temporary.replace(path)

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Make compare-and-rename one step among writers. The kernel releases the lock when its holder dies."""
        with _lock_of(path).open("ab") as stream:
            _lock(stream)
            try:
                yield
            finally:
                # Closing does not release it while a process forked meanwhile, such as a loader's worker, has the file open too.
                with contextlib.suppress(OSError):
                    fcntl.flock(stream, fcntl.LOCK_UN)


def _mark(status: os.stat_result) -> str:
    """Identify a file by time and size. Successive holders of a lease write at least its slack apart."""
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _lock_of(path: Path) -> Path:
    return path.parent / (partial_name(path.name, "").removesuffix(".part") + "lock")


def _lock(stream: BinaryIO) -> None:
    """Lock a file. Raises Unavailable if another process holds the lock for longer than any write takes."""
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() - began > LOCK_SECONDS:
                raise Unavailable(
                    f"{stream.name} has been locked by another process for {LOCK_SECONDS:.0f} s; look for one that hangs"
                ) from None
            time.sleep(0.005)
        except OSError:  # Lustre mounted without `flock` refuses; only the comparison is left, a weaker guarantee
            return
