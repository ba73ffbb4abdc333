"""The door to a folder: Lustre, NFS, NVMe. Temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from itertools import cycle
from pathlib import Path
from typing import BinaryIO

from job.errors import DataError, JobError, NotAllowed, SpecError, Unavailable
from job.store.protocol import Capabilities, Conflict, Corrupt, Digest, Entry, Missing, checked_key

CHUNK = 8 * 2**20
LOCK_SECONDS = 60.0
"""A lock is held for as long as a small file takes to be written and renamed."""
_OURS = re.compile(r"^\..*\.([0-9a-f]{12}\.part|lock)$")


def disk_fault(error: OSError, path: Path) -> JobError:
    """The sentence for what a file system answered, with the exit class that fits."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unavailable(f"The disk that holds {path} is full or over its quota; free some space and run again.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return NotAllowed(f"This user may not write or read {path}: {os.strerror(error.errno)}.")
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return SpecError(f"{path} cannot be a folder of this store: {os.strerror(error.errno)}; choose another place.")
    return Unavailable(f"The file system failed at {path}: {error.strerror or error}.")


@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn the OSErrors of a block into the sentences of `disk_fault`."""
    try:
        yield
    except OSError as error:
        raise disk_fault(error, path) from error


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_name(name: str, mark: str) -> str:
    """The name under which a file is written until it is whole; never longer than file systems take."""
    return f".{name.encode()[:200].decode(errors='ignore')}.{mark}.part"


def _unless_gone(error: OSError) -> None:
    """A folder that is not there holds nothing; one that cannot be read may hold anything."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


class LocalStore:
    """Objects as files under a root folder."""

    def __init__(self, url: str, root: Path) -> None:
        self.url = url
        self.root = root

    def list(self, prefix: str = "") -> Iterator[Entry]:
        start = self.root / prefix.rpartition("/")[0] if "/" in prefix else self.root
        found: list[Entry] = []
        with disk(start):
            for folder, _, names in os.walk(start, onerror=_unless_gone):
                for name in names:
                    key = (Path(folder) / name).relative_to(self.root).as_posix()
                    if key.startswith(prefix) and not _OURS.match(name):
                        with contextlib.suppress(FileNotFoundError):
                            status = (Path(folder) / name).stat()
                            found.append(Entry(key, status.st_size, status.st_mtime))
        yield from sorted(found)

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
        return hashlib.sha256(self.read(key)).hexdigest()

    def age(self, key: str) -> float:
        """By touching a file beside it: on a network folder both times then come from the server."""
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
            if if_absent:
                self._link(temporary, path, key)
            elif if_match is not None:
                with self._locked(path):
                    if not path.exists() or self.version(key) != if_match:
                        raise Conflict(f"Another writer changed {key} in {self.url}.")
                    temporary.replace(path)
            else:
                temporary.replace(path)
            sync_folder(path.parent)
        return hashlib.sha256(data).hexdigest()

    def upload(self, path: Path, key: str) -> Digest:
        with disk(path), path.open("rb", buffering=0) as source:
            return self.upload_pieces(_pieces(source), os.fstat(source.fileno()).st_size, key)

    def upload_pieces(self, pieces: Iterator[memoryview], size: int, key: str) -> Digest:
        target = self._path(key)
        with disk(target), self._temporary(target) as (stream, temporary):
            digest = copy(_begun(pieces, stream), stream)
            if digest.size != size:
                raise DataError(f"What goes to {key} was to hold {size} bytes, and held {digest.size}.")
            os.fsync(stream.fileno())
            temporary.replace(target)
            sync_folder(target.parent)
        return digest

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> Digest:
        source_path = self._path(key)
        with disk(path), contextlib.ExitStack() as stack:
            try:
                source = stack.enter_context(source_path.open("rb", buffering=0))
            except (FileNotFoundError, NotADirectoryError):
                raise Missing(f"There is no {key} in {self.url}.") from None
            stream, temporary = stack.enter_context(self._temporary(path))
            digest = copy(_pieces(source), stream)
            if sha256 is not None and digest.sha256 != sha256:
                raise Corrupt(f"{key} in {self.url} has SHA-256 {digest.sha256}, not {sha256} as promised.")
            stream.flush()
            temporary.replace(path)
        return digest

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self._path(key)
            with disk(path):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    path.unlink()
                with contextlib.suppress(OSError):  # a folder that still holds something stays
                    for folder in path.parents:
                        if folder == self.root or self.root not in folder.parents:
                            break
                        left = [path.name for path in folder.iterdir()]
                        if all(_OURS.match(name) and name.endswith(".lock") for name in left):
                            for name in left:
                                (folder / name).unlink()
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
        finally:
            self.delete([key])
            with contextlib.suppress(OSError):
                (self.root / f".{key}.lock").unlink()
        weaker = () if conditional else (f"{self.url} has no exclusive create, so two writers may not see each other.",)
        return Capabilities(conditional, checksums=True, weaker=weaker)

    def abort_stale(self, prefix: str, older_than: float) -> int:
        """Temporary files of writers that were killed."""
        count = 0
        start = self.root / prefix.rpartition("/")[0]
        now = None
        with disk(start):
            for folder, _, names in os.walk(start):
                for path in (Path(folder) / name for name in names if name.endswith(".part") and _OURS.match(name)):
                    if now is None:
                        with self._temporary(path) as (_, temporary):
                            now = temporary.stat().st_mtime
                    with contextlib.suppress(FileNotFoundError):
                        if now - path.stat().st_mtime >= older_than:
                            path.unlink()
                            count += 1
        return count

    def _path(self, key: str) -> Path:
        return self.root / checked_key(key)

    @contextlib.contextmanager
    def _temporary(self, target: Path) -> Iterator[tuple[BinaryIO, Path]]:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / partial_name(target.name, secrets.token_hex(6))
        try:
            with temporary.open("xb") as stream:
                yield stream, temporary
        finally:
            temporary.unlink(missing_ok=True)

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
        """Compare-and-rename as one step among writers. The kernel lets the lock go when its holder dies."""
        lock = path.parent / (partial_name(path.name, "").removesuffix(".part") + "lock")
        with lock.open("wb") as stream:
            _lock(stream)
            try:
                yield
            finally:
                # Closing does not do it while a process forked meanwhile, as a loader's workers are, has the file open too.
                with contextlib.suppress(OSError):
                    fcntl.flock(stream, fcntl.LOCK_UN)


def _lock(stream: BinaryIO) -> None:
    """Raises Unavailable when another has held the lock for longer than any write takes."""
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
        except OSError:  # a Lustre mounted without `flock` refuses; the comparison alone is then the weaker guarantee
            return


def copy(pieces: Iterator[memoryview], target: BinaryIO) -> Digest:
    """Write pieces and hash them meanwhile. Each has to stay as it is until the one after the next is asked for."""
    digest, size = hashlib.sha256(), 0
    hashing: Future[None] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="hash") as pool:
        for piece in pieces:
            if hashing is not None:
                hashing.result()
            if len(piece) >= 2**20:  # a small file is done before a thread has started
                hashing = pool.submit(digest.update, piece)
            else:
                digest.update(piece)
            target.write(piece)
            size += len(piece)
    target.flush()
    return Digest(size, digest.hexdigest())


def _pieces(source: FileIO) -> Iterator[memoryview]:
    """A file's bytes, in two buffers by turns. They are mapped, so that a small file touches little of them."""
    for buffer in cycle([memoryview(mmap.mmap(-1, CHUNK)), memoryview(mmap.mmap(-1, CHUNK))]):
        if not (count := source.readinto(buffer)):
            return
        yield buffer[:count]


def _begun(pieces: Iterator[memoryview], target: BinaryIO) -> Iterator[memoryview]:
    """The same pieces. The disk begins to take them while they are being written, so that fsync has little to wait for."""
    begun = written = 0
    for piece in pieces:
        yield piece
        written += len(piece)
        if written - begun >= CHUNK:
            os.posix_fadvise(target.fileno(), begun, written - begun, os.POSIX_FADV_DONTNEED)
            begun = written
