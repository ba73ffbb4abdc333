"""Finds out what an S3 store really does with conditions and checksums, on a small object of our own."""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError

from job.errors import JobError, SpecError, Unavailable
from job.store import upload
from job.store.protocol import Capabilities, Conflict, Missing
from job.store.s3_errors import BROKEN, code_of, explain

if TYPE_CHECKING:
    from job.store.s3 import S3Store


def probe(store: S3Store) -> Capabilities:
    """Test conditions, checksums and encryption."""
    key = f"probe-{secrets.token_hex(6)}"
    try:
        found = _try_out(store, key)
    except BaseException:
        with contextlib.suppress(JobError):
            store.delete([key])
        raise
    try:
        store.call("delete_object", "s3:DeleteObject", key, **store.unchanged('"0"'))
    except (Conflict, Missing, SpecError, Unavailable) as refused:
        found = found._replace(deletes=isinstance(refused, Conflict))
        store.delete([key])
    return found


def _try_out(store: S3Store, key: str) -> Capabilities:
    weaker = []
    checksums = _checks_checksums(store, key)
    if not checksums:
        weaker.append(f"{store.endpoint} checks no CRC32C, so each part is sent with an MD5 and its ETag compared.")
    etag = store.put(key, b"a", {}, checksums=checksums)
    store.read(key)
    # First what must be refused, then what must not be: Ceph 16 accepts an ETag only without its quotes.
    conditional = _refuses(store, key, {"IfNoneMatch": "*"}) and _refuses(store, key, {"IfMatch": '"0"'})
    store.quotes = not _refuses(store, key, {"IfMatch": etag})
    if not store.quotes:
        conditional = conditional and not _refuses(store, key, store.unchanged(store.version(key)))
    if not conditional:
        weaker.append(f"{store.endpoint} has no conditional writes, so two writers may collide.")
    return Capabilities(conditional, checksums, deletes=False, weaker=tuple(weaker))


def _checks_checksums(store: S3Store, key: str) -> bool:
    """Return whether a wrong checksum is refused and a right one is not."""
    for data, wrong in ((b"right", False), (b"wrong", True)):
        refusal = _refusal(store, key, data, **upload.crc32c(b"right"))
        if refusal is not None and code_of(refusal)[1] not in (400, 501):
            raise explain(refusal, "s3:PutObject", store.place(key), store.endpoint, store.sse) from refusal
        if (refusal is not None) != wrong:
            return False
    return True


def _refuses(store: S3Store, key: str, condition: dict[str, str]) -> bool:
    refusal = _refusal(store, key, b"a", **condition)
    return refusal is not None and code_of(refusal)[1] == 412


def _refusal(store: S3Store, key: str, data: bytes, **arguments: str) -> ClientError | None:
    """Put an object without retries or checks of ours. Returns the store's refusal, if it refuses."""
    try:
        store.client.put_object(
            Bucket=store.bucket, Key=store.prefix + key, Body=data, **arguments, **store.encryption()
        )
    except ClientError as error:
        return error
    except BROKEN as error:
        raise explain(error, "s3:PutObject", store.place(key), store.endpoint, store.sse) from error
    return None
