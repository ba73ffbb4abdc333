"""Images that are elsewhere: behind URLs in rows, fetched once and kept on scratch; and in shards too large to bring here."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import urllib.error
import urllib.request
from functools import lru_cache
from http.client import HTTPException, IncompleteRead, InvalidURL
from pathlib import Path
from urllib.parse import urlsplit

from job.errors import SpecError, Unavailable
from job.store import Missing, Store, open_store

TRIES = 4
TIMEOUT = 30.0
LARGEST = 500_000_000


def fetched(url: str, folder: Path) -> Path | None:
    """The file that holds what is behind `url`; None when nothing is there. Raises Unavailable when nobody answers."""
    path = folder / hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    root, _, key = url.rpartition("/")
    try:
        if url.startswith("s3://"):
            open_store(root).download(key, path)
            return path
        data = _get(url)
    except (Missing, SpecError):  # the latter: a URL that names no bucket
        return None
    partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    partial.write_bytes(data)
    partial.rename(path)
    return path


def piece(url: str, offset: int, size: int) -> bytes:
    """Bytes of an object of an `s3://` store. Raises Unavailable when it does not answer, Missing when it is gone."""
    root, _, key = url.rpartition("/")
    return _store(root, os.getpid()).read_piece(key, offset, size)


@lru_cache(16)
def _store(root: str, _process: int) -> Store:
    """One a process: a connection must not be shared with the process that forked this one."""
    return open_store(root)


def _get(url: str) -> bytes:
    """Raises Missing for what will not be there the next time either."""
    for attempt in range(TRIES):
        try:
            host = urlsplit(url).netloc
            if not host:
                raise InvalidURL
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
                data: bytes = answer.read(LARGEST)
                if len(data) < min(int(answer.headers.get("Content-Length") or 0), LARGEST):
                    raise IncompleteRead(data)
                return data
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise Missing(url) from error
            reason = f"answers {error.code}"
        except (ValueError, InvalidURL) as error:
            raise Missing(url) from error
        except (OSError, HTTPException) as error:
            reason = f"does not answer ({type(error).__name__})"
        time.sleep(0.2 * 4**attempt)
    raise Unavailable(f"dataset: {host}, where rows have their images, {reason}; try again, or mend the rows")
