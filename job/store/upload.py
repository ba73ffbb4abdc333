"""Uploads files to S3: parts in parallel, one SHA-256 pass on the way, memory bounded by `S3Store.room`."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, wait
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c

from job.errors import DataError, JobError
from job.store.disk import disk
from job.store.protocol import Conflict, Digest, Missing

if TYPE_CHECKING:
    from job.store.s3 import S3Store

PART = 16 * 2**20
MAX_PARTS = 9_000  # S3 allows 10,000
DAMAGED_TRIES = 3


def upload(store: S3Store, path: Path, key: str, if_absent: bool, if_match: str | None) -> Digest:
    """Send a file in one request, or in parts if it is larger than one part. The digest is of the bytes sent."""
    with disk(path), path.open("rb", buffering=0) as source:
        return upload_from(store, source, os.fstat(source.fileno()).st_size, key, if_absent, if_match)


class Joined:
    """Pieces as a file that is read once, from beginning to end."""

    def __init__(self, pieces: Iterator[memoryview]) -> None:
        self._pieces = pieces
        self._left = memoryview(b"")

    def read(self, size: int) -> bytes:
        """Returns fewer than `size` bytes only at the end."""
        taken: list[memoryview] = []
        while size:
            if not len(self._left):
                if (piece := next(self._pieces, None)) is None:
                    break
                self._left = piece
            taken.append(self._left[:size])
            self._left = self._left[size:]
            size -= len(taken[-1])
        return b"".join(taken)


def upload_from(
    store: S3Store, source: FileIO | Joined, size: int, key: str, if_absent: bool, if_match: str | None
) -> Digest:
    """Like `upload`, for `size` bytes that are read once and in order. The condition applies to the request that completes it."""
    if size <= store.part_size:
        data = _read_exactly(source, size, key)
        whole = hashlib.sha256(data)
        _at_its_end(source, key)
        return Digest(size, whole.hexdigest(), store.write(key, data, if_absent=if_absent, if_match=if_match))
    name = os.urandom(8).hex()
    algorithm = {"ChecksumAlgorithm": "CRC32C"} if store.capabilities.checksums else {}
    begun = store.call(
        "create_multipart_upload", "s3:PutObject", key, Metadata={"upload": name}, **algorithm, **store.encryption()
    )
    try:
        store.check_encryption(begun, key)
        digest = hashlib.sha256()
        parts = _send(store, source, size, key, begun["UploadId"], digest)
        _at_its_end(source, key)
        if if_absent or if_match is not None:
            store.look_first(key, if_match)  # some stores support conditions only for single requests
        condition = store.condition(key, if_absent, if_match)
        version = _complete(store, key, begun["UploadId"], parts, name, condition)
    except BaseException:
        with contextlib.suppress(JobError):
            store.call("abort_multipart_upload", "s3:AbortMultipartUpload", key, UploadId=begun["UploadId"])
        raise
    return Digest(size, digest.hexdigest(), version)


def crc32c(data: bytes) -> dict[str, str]:
    """The checksum that the store verifies a body against on arrival. Processors have CRC32C built in, so it costs next to
    nothing on either side; SHA-256, which the manifest has for the whole, would cost the store as much again as us."""
    return {
        "ChecksumAlgorithm": "CRC32C",
        "ChecksumCRC32C": base64.b64encode(google_crc32c.value(data).to_bytes(4)).decode(),
    }


def md5(data: bytes) -> dict[str, str]:
    """The same for a store that supports only the old way, which is slow."""
    return {"ContentMD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}


def _at_its_end(source: FileIO | Joined, key: str) -> None:
    if source.read(1):
        raise DataError(f"The content of {key} changed size during its upload.")


def _send(
    store: S3Store, source: FileIO | Joined, size: int, key: str, upload_id: str, digest: hashlib._Hash
) -> list[dict[str, Any]]:
    """Read part by part; a worker sends each part while this thread hashes it."""
    part_size = max(store.part_size, -(-size // MAX_PARTS))
    sent: list[Future[dict[str, Any]]] = []
    try:
        for number, start in enumerate(range(0, size, part_size), 1):
            for earlier in sent:
                if earlier.done():
                    earlier.result()  # raises early if a part has failed for good
            store.room.acquire()
            try:
                body = _read_exactly(source, min(part_size, size - start), key)
                future = store.pool.submit(_send_part, store, key, upload_id, number, body)
            except BaseException:
                store.room.release()
                raise
            sent.append(future)
            digest.update(body)
            del body  # or it would outlive its place in `store.room`
            future.add_done_callback(lambda _: store.room.release())
        return [future.result() for future in sent]
    finally:
        for future in sent:
            future.cancel()
        wait(sent)


def _read_exactly(source: FileIO | Joined, size: int, key: str) -> bytes:
    body = source.read(size)
    while body is not None and len(body) < size:
        if not (more := source.read(size - len(body))):
            raise DataError(f"The content of {key} became shorter during its upload.")
        body += more
    return body or b""


def _send_part(store: S3Store, key: str, upload_id: str, number: int, body: bytes) -> dict[str, Any]:
    checked = store.capabilities.checksums
    check = crc32c(body) if checked else md5(body)
    for _ in range(DAMAGED_TRIES):
        answer = store.call(
            "upload_part", "s3:PutObject", key, UploadId=upload_id, PartNumber=number, Body=body, **check
        )
        if checked:
            return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumCRC32C": check["ChecksumCRC32C"]}
        if store.is_intact(answer, check["ContentMD5"]):
            return {"PartNumber": number, "ETag": answer["ETag"]}
    raise store.damaged(key)


def _complete(
    store: S3Store, key: str, upload_id: str, parts: list[dict[str, Any]], name: str, condition: dict[str, str]
) -> str:
    """Complete the upload and return its version. Raises Conflict if the condition does not hold, or another process aborted
    this upload."""
    whole = {"UploadId": upload_id, "MultipartUpload": {"Parts": parts}}
    try:
        etag = str(store.call("complete_multipart_upload", "s3:PutObject", key, **whole, **condition)["ETag"])
    except (Conflict, Missing):
        etag = ""
    if not etag:
        # Ceph 16 returns none, or the first try succeeded and its answer was lost: then the object has this upload's name.
        with contextlib.suppress(Missing):
            there = store.call("head_object", "s3:GetObject", key)
            if there.get("Metadata", {}).get("upload") == name:
                return str(there["ETag"])
        raise Conflict(f"Another writer changed {store.place(key)}.")
    return etag
