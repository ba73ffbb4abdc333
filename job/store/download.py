"""Downloads files from S3: ranges in parallel, one SHA-256 pass on the way, memory bounded by the buffers."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import queue
import secrets
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, wait
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from botocore.exceptions import BotoCoreError
from urllib3.exceptions import HTTPError

from job.errors import Unavailable
from job.store import connection
from job.store.disk import disk, partial_name
from job.store.protocol import Corrupt, Digest

if TYPE_CHECKING:
    from job.store.s3 import S3Store

WINDOW = connection.WORKERS + 1
CHUNK = 2**20
FLOOR = 10_000
"""Bytes per second that a body must deliver after its first `PATIENCE` seconds."""
PATIENCE = 60.0


class Buffers:
    """A few reusable buffers. A caller waits until one is free, which bounds memory."""

    def __init__(self, count: int) -> None:
        self._free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(bytearray())

    def take(self, size: int) -> bytearray:
        """Only for a caller that holds no buffer, or returns those it holds without asking for more."""
        buffer = self._free.get()
        return buffer if len(buffer) == size else bytearray(size)

    def take_if_free(self, size: int) -> bytearray | None:
        try:
            buffer = self._free.get_nowait()
        except queue.Empty:
            return None
        return buffer if len(buffer) == size else bytearray(size)

    def give(self, buffer: bytearray) -> None:
        self._free.put(buffer)


def download(store: S3Store, key: str, path: Path, promised: str | None) -> Digest:
    """Fetch ranges in parallel; hash and write them in order, so that the part file is always a true beginning."""
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for fresh in (False, True):
            there = store.call("head_object", "s3:GetObject", key)
            size, etag = int(there["ContentLength"]), str(there["ETag"])
            mark = hashlib.sha256(etag.encode()).hexdigest()[:12]
            with _alone(path, mark) as partial:
                digest = _fetch_all(store, key, etag, size, partial, fresh)
                if promised is None or digest.sha256 == promised:
                    partial.replace(path)
                    return digest._replace(version=etag)
                if fresh:
                    partial.unlink()
    raise Corrupt(f"{store.place(key)} has SHA-256 {digest.sha256}, not {promised} as expected.")


@contextlib.contextmanager
def _alone(path: Path, mark: str) -> Iterator[Path]:
    """Yield a part file of `path` that no other thread or process writes to meanwhile. Rows may name one image twice, and jobs
    share scratch: whoever comes second gets a separate part file, of which nothing is left for a later attempt."""
    partial = path.parent / partial_name(path.name, mark)
    with partial.open("ab") as held:
        if _is_locked(held, partial):
            try:
                yield partial
            finally:
                # Closing does not release it while a process forked meanwhile has the file open too.
                with contextlib.suppress(OSError):
                    fcntl.flock(held, fcntl.LOCK_UN)
            return
    own = path.parent / partial_name(path.name, secrets.token_hex(6))
    try:
        yield own
    finally:
        own.unlink(missing_ok=True)


def _is_locked(held: BinaryIO, partial: Path) -> bool:
    """Lock a part file. Returns False if another process holds it, or has completed and renamed it since it was opened."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(partial.stat(), os.fstat(held.fileno()))
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:  # Lustre mounted without `flock` refuses
        return True


def _fetch_all(store: S3Store, key: str, etag: str, size: int, partial: Path, fresh: bool) -> Digest:
    digest = hashlib.sha256()
    with partial.open("wb" if fresh else "ab+", buffering=0) as target:
        target.seek(0)
        while chunk := b"" if fresh else target.read(2**20):
            digest.update(chunk)
        done = target.tell()
        if done > size:
            target.truncate(0)
            return _fetch_all(store, key, etag, size, partial, fresh=True)
        free = shutil.disk_usage(partial.parent).free
        if free < size - done:
            raise Unavailable(
                f"The disk that holds {partial.parent} has {free / 1e9:.1f} GB free, and {store.place(key)} needs "
                f"{(size - done) / 1e9:.1f} GB."
            )
        for view in _ranges(store, key, etag, done, size):
            target.write(view)
            digest.update(view)
    return Digest(size, digest.hexdigest())


def _ranges(store: S3Store, key: str, etag: str, start: int, size: int) -> Iterator[memoryview]:
    """Yield the object from `start` on, in order, with several ranges in flight. A view is valid until the next is requested."""
    window: deque[tuple[Future[None], bytearray, memoryview]] = deque()
    ahead = start
    try:
        while True:
            while len(window) < WINDOW and ahead < size:
                # Waiting for a buffer while holding some would starve the other files of the folder, and they would starve us.
                take = store.buffers.take_if_free if window else store.buffers.take
                if (buffer := take(store.part_size)) is None:
                    break
                view = memoryview(buffer)[: min(store.part_size, size - ahead)]
                window.append((store.pool.submit(_fetch, store, key, etag, ahead, view), buffer, view))
                ahead += len(view)
            if not window:
                return
            future, buffer, view = window[0]
            future.result()
            yield view
            window.popleft()
            store.buffers.give(buffer)
    finally:
        for future, buffer, _ in window:
            if not future.cancel():
                wait([future])
            store.buffers.give(buffer)


def _fetch(store: S3Store, key: str, etag: str, start: int, view: memoryview) -> None:
    """Fill `view` from the object, resuming where a broken answer stopped."""
    got = failures = 0
    while got < len(view):
        before = got
        try:
            wanted = f"bytes={start + got}-{start + len(view) - 1}"
            answer = store.call("get_object", "s3:GetObject", key, Range=wanted, IfMatch=etag)
            if answer["ContentLength"] != len(view) - got:
                answer["Body"].close()
                raise OSError("the answer is not the requested range")
            for chunk in arriving(answer, store.place(key)):
                view[got : got + len(chunk)] = chunk
                got += len(chunk)
        except (HTTPError, HTTPException, BotoCoreError, OSError) as error:
            failures = 1 if got > before else failures + 1
            if failures == connection.ATTEMPTS:
                raise Unavailable(f"Reading {store.place(key)} failed repeatedly: {error}.") from error
            time.sleep(min(0.1 * 2**failures, 5))


def arriving(answer: dict[str, Any], place: str) -> Iterator[bytes]:
    """Yield a body as it arrives. Raises OSError if it ends too early, Unavailable if it is slower than `FLOOR`, which a retry
    would not fix."""
    left = int(answer["ContentLength"])
    seconds = PATIENCE + left / FLOOR
    until = time.monotonic() + seconds
    with contextlib.closing(answer["Body"]) as body:
        source = _source(body)
        while left:
            if not (chunk := source.read1(min(left, CHUNK))):
                raise OSError(f"the answer ended {left} bytes early")
            left -= len(chunk)
            yield chunk
            if left and time.monotonic() > until:
                raise Unavailable(
                    f"{place} arrives too slowly: {left} bytes are missing after {seconds:.0f} s; check network and store."
                )
        source.close()
        _release(body)


def _source(body: Any) -> Any:
    """Return where to read as much of a body as is there: http.client's own response, since urllib3 copies each byte twice
    more."""
    inner = getattr(getattr(body, "_raw_stream", None), "_fp", None)
    return inner if isinstance(inner, HTTPResponse) else body._raw_stream


def _release(body: Any) -> None:
    """Return the connection for the next range before the body is closed. A broken connection is dropped with its body."""
    release = getattr(getattr(body, "_raw_stream", None), "release_conn", None)
    if release is not None:
        release()
