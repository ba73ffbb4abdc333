"""Files on a disk: its errors as sentences, folders that survive a power failure, copies that are hashed on the way."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from itertools import cycle, takewhile
from pathlib import Path
from typing import BinaryIO

from job.errors import JobError, NotAllowed, SpecError, Unavailable
from job.store.protocol import Digest

CHUNK = 8 * 2**20
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
FAILING = frozenset({errno.EIO, errno.ESTALE, errno.EUCLEAN, errno.EREMOTEIO, errno.ENOTCONN, errno.ESHUTDOWN})
"""Errors of a failing disk, or of a failing connection to it."""
LASTING = frozenset(
    {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EILSEQ, errno.EFBIG}
    | {errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP}
)
"""Errors that a file system repeats however often it is asked."""


def disk_fault(error: OSError, path: Path) -> JobError:
    """Translate a file system error into a sentence, with the exit class that fits."""
    if error.errno in FULL:
        return Unavailable(f"The disk that holds {path} is full or over its quota; free some space and run again.")
    if error.errno == errno.EROFS:
        return Unavailable(f"The file system of {path} is read-only; remount it, or choose another folder.")
    if error.errno in (errno.EACCES, errno.EPERM):
        return NotAllowed(f"This user may not write or read {path}: {os.strerror(error.errno)}.")
    if error.errno in LASTING:
        return SpecError(f"{path} cannot be used: {os.strerror(error.errno)}; choose another folder.")
    if error.errno in (errno.ENOENT, errno.EEXIST) and (link := _leads_nowhere(path)):
        return SpecError(
            f"{link} is a link to {link.readlink()}, which does not exist; fix the link or choose another folder."
        )
    if error.errno == errno.EEXIST:
        return SpecError(f"{path} cannot be a folder of this store: {os.strerror(error.errno)}; choose another folder.")
    return Unavailable(
        f"The file system failed at {path}: {error.strerror or error}; run again, and if it recurs, on another disk or node."
    )


def _leads_nowhere(path: Path) -> Path | None:
    """Find the link on the way to `path` whose target does not exist."""
    with contextlib.suppress(OSError):
        return next((each for each in (path, *path.parents) if each.is_symlink() and not each.exists()), None)
    return None


@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn the OSErrors of a block into the sentences of `disk_fault`."""
    try:
        yield
    except OSError as error:
        raise disk_fault(error, path) from error


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, and make each new one survive a power failure too."""
    new = list(takewhile(lambda each: not each.exists(), (folder, *folder.parents)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:
        if _leads_nowhere(folder) or not new or not new[-1].parent.is_dir():
            raise
        raise SpecError(
            f"{new[-1]} cannot be created: that file system takes no new folders; choose another folder."
        ) from None
    for each in reversed(new):
        sync_folder(each.parent)


def partial_name(name: str, mark: str) -> str:
    """The name of a file until it is complete; never longer than file systems allow."""
    return f".{name.encode()[:200].decode(errors='ignore')}.{mark}.part"


def copy(pieces: Iterator[memoryview], target: BinaryIO) -> Digest:
    """Write pieces and hash them meanwhile. Each must stay unchanged until the one after the next is requested."""
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


def pieces_of(source: FileIO) -> Generator[memoryview]:
    """Yield a file's bytes in two alternating buffers. They are mapped, so that a small file touches little of them."""
    for buffer in cycle([memoryview(mmap.mmap(-1, CHUNK)), memoryview(mmap.mmap(-1, CHUNK))]):
        if not (count := source.readinto(buffer)):
            return
        yield buffer[:count]


def written_early(pieces: Iterator[memoryview], target: BinaryIO) -> Iterator[memoryview]:
    """Yield the same pieces, making the disk write them as they come, so that fsync has little to wait for."""
    begun = written = 0
    for piece in pieces:
        yield piece
        written += len(piece)
        if written - begun >= CHUNK:
            os.posix_fadvise(target.fileno(), begun, written - begun, os.POSIX_FADV_DONTNEED)
            begun = written
