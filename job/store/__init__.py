"""One door to objects: `s3://bucket/prefix`, `file:///path` or a plain path, behind one small protocol."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from job.errors import JobError, Preempted, SpecError
from job.store.folders import download_folder, files_of, inside, upload_files, upload_folder
from job.store.local import LocalStore
from job.store.protocol import Capabilities, Conflict, Corrupt, Digest, Entry, Missing, Store, checked_key
from job.store.reader import ReadOnly

__all__ = [
    "Capabilities",
    "Conflict",
    "Corrupt",
    "Digest",
    "Entry",
    "LocalStore",
    "Missing",
    "ReadOnly",
    "Store",
    "check_writable",
    "checked_key",
    "download_folder",
    "files_of",
    "inside",
    "open_store",
    "upload_files",
    "upload_folder",
]

log = logging.getLogger(__name__)
STALE_SECONDS = 24 * 3600.0


def open_store(url: str, *, sse: str | None = None, sse_kms_key_id: str | None = None) -> Store:
    """The store that a url names. Nothing is asked of it yet. Raises SpecError for a url that names none.

    `sse` ("AES256" or "aws:kms") and `sse_kms_key_id` are demanded of every object that is written.
    """
    parts = urlsplit(url)
    if parts.scheme == "s3":
        from job.store.s3 import S3Store  # boto3 takes a third of a second, which a folder need not wait for

        if parts.username or parts.password or parts.query or parts.fragment:
            raise SpecError("An s3:// url is s3://bucket/prefix; credentials and options have no place in it.")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]", parts.netloc):
            raise SpecError(f"{url!r} names no bucket; an s3:// url is s3://bucket/prefix.")
        prefix = parts.path.strip("/")
        if prefix:
            checked_key(prefix)
        return S3Store(url, parts.netloc, prefix and prefix + "/", sse=sse, sse_kms_key_id=sse_kms_key_id)
    if parts.scheme not in ("", "file") and "://" in url:
        raise SpecError(
            f"{url!r} is of a kind this job does not know; known are s3://bucket/prefix, file:///path, /path."
        )
    if sse is not None:
        raise SpecError(f"Encryption {sse} was asked of the folder {url}; only an s3:// store can give it.")
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise SpecError(f"{url!r} names no local folder; a file url has three slashes: file:///path.")
        return LocalStore(url, Path(unquote(parts.path)))
    if not url:
        raise SpecError("The url of the store is empty.")
    return LocalStore(url, Path(url).absolute())


def check_writable(store: Store) -> Capabilities:
    """Write, read and delete a small object, and give up uploads that died more than `STALE_SECONDS` ago.

    Raises NotAllowed (77), Unavailable (69) or SpecError (78) with the reason. Each weaker guarantee is a warning.
    """
    found = store.probe()
    try:
        store.abort_stale("", STALE_SECONDS)
    except Preempted:
        raise
    except JobError as error:
        found = found._replace(weaker=(*found.weaker, f"Uploads that died cannot be cleaned up. {error}"))
    for sentence in found.weaker:
        log.warning("%s", sentence)
    return found
