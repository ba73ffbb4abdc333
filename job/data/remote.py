"""Images that are elsewhere: behind URLs in rows, fetched once and kept on scratch; and in shards too large to bring here."""

from __future__ import annotations

import hashlib
import os
import time
import urllib.error
import urllib.request
from functools import lru_cache
from http.client import HTTPException, InvalidURL
from pathlib import Path

from job.errors import Unavailable
from job.store import Missing, Store, open_store

TRIES = 4
TIMEOUT = 30.0
LARGEST = 500_000_000
GONE = range(400, 500)


def fetched(url: str, folder: Path) -> Path | None:
    """The file that holds what is behind `url`; None when nothing is there. Raises Unavailable when nobody answers."""
    path = folder / hashlib.sha256(url.encode()).hexdigest()
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if url.startswith("s3://"):
        root, _, key = url.rpartition("/")
        try:
            open_store(root).download(key, path)
        except Missing:
            return None
        return path
    data = _get(url)
    if data is None:
        return None
    partial = path.with_suffix(f".{os.getpid()}-{time.monotonic_ns()}")
    partial.write_bytes(data)
    partial.rename(path)
    return path


def piece(url: str, offset: int, size: int) -> bytes:
    """Bytes of an object of an `s3://` store. Raises Unavailable when it does not answer, DataError when it is gone."""
    root, _, key = url.rpartition("/")
    return _store(root, os.getpid()).read_piece(key, offset, size)


@lru_cache(16)
def _store(root: str, _process: int) -> Store:
    """One a process: a connection must not be shared with the process that forked this one."""
    return open_store(root)


def _get(url: str) -> bytes | None:
    for attempt in range(TRIES):
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
                data: bytes = answer.read(LARGEST)
                return data
        except urllib.error.HTTPError as error:
            if error.code in GONE and error.code != 429:
                return None
            reason = f"answers {error.code}"
        except (ValueError, InvalidURL):
            return None
        except (OSError, HTTPException) as error:
            reason = f"does not answer ({type(error).__name__})"
        time.sleep(0.2 * 4**attempt)
    host = url.split("/")[2]
    raise Unavailable(f"dataset: {host}, where rows have their images, {reason}")
