"""Stores of objects at `s3://bucket/prefix`, `file:///path` or a plain path, behind one small protocol."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from job.errors import SpecError
from job.store.folders import download_files, files_of, inside, upload_files, upload_folder
from job.store.local import LocalStore
from job.store.owned import OwnedStore, take_back
from job.store.protocol import Capabilities, Conflict, Corrupt, Digest, Entry, Missing, Store, checked_key
from job.store.read_only import ReadOnly
from job.store.urls import unusable

__all__ = [
    "Capabilities",
    "Conflict",
    "Corrupt",
    "Digest",
    "Entry",
    "LocalStore",
    "Missing",
    "OwnedStore",
    "ReadOnly",
    "Store",
    "check_writable",
    "checked_key",
    "download_files",
    "files_of",
    "inside",
    "open_store",
    "take_back",
    "upload_files",
    "upload_folder",
]

log = logging.getLogger(__name__)


def open_store(url: str, *, sse: str | None = None, sse_kms_key_id: str | None = None) -> Store:
    """Return the store that a URL names, without contacting it. Raises SpecError for a URL that names none.

    `sse` ("AES256" or "aws:kms") and `sse_kms_key_id` are required of every object written.
    """
    if problem := unusable(url):
        raise SpecError(problem)
    parts = urlsplit(url)
    if parts.scheme == "s3":
        from job.store.s3 import S3Store  # importing boto3 takes a third of a second; folders skip it

        if parts.query or parts.fragment:
            raise SpecError("An s3:// URL is s3://bucket/prefix, without options.")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]", parts.netloc):
            raise SpecError(f"{url!r} names no bucket; write s3://bucket/prefix.")
        prefix = parts.path.strip("/")
        if prefix:
            checked_key(prefix)
        return S3Store(url, parts.netloc, prefix and prefix + "/", sse=sse, sse_kms_key_id=sse_kms_key_id)
    if parts.scheme not in ("", "file") and "://" in url:
        raise SpecError(f"{url!r} is not a supported URL; write s3://bucket/prefix, file:///path or /path.")
    if sse is not None:
        raise SpecError(f"Encryption {sse} needs an s3:// store, and {url} is a folder.")
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise SpecError(f"{url!r} names no local folder; a file URL has three slashes: file:///path.")
        return LocalStore(url, Path(unquote(parts.path)))
    if not url:
        raise SpecError("The URL of the store is empty.")
    try:
        return LocalStore(url, Path(url).expanduser().absolute())
    except RuntimeError as unknown:
        raise SpecError(f"{url} starts with the home of a user that this machine does not have.") from unknown


def check_writable(store: Store) -> Capabilities:
    """Write, read and delete a small object.

    Raises NotAllowed (77), Unavailable (69) or SpecError (78) with the reason. Logs a warning for each weaker guarantee.
    """
    found = store.probe()
    for sentence in found.weaker:
        log.warning("%s", sentence)
    return found
