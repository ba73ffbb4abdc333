"""Stores objects in S3 and everything that speaks it: AWS, Ceph, MinIO, R2 and the rest.

Credentials, endpoint, region and certificate authorities come from the platform's own variables, files and roles, as boto3 finds
them: AWS_ENDPOINT_URL_S3, AWS_REGION, AWS_CA_BUNDLE, AWS_ROLE_ARN with AWS_WEB_IDENTITY_TOKEN_FILE, AWS_CONFIG_FILE (where `s3 =
addressing_style = virtual` selects virtual-host addresses for a custom endpoint).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from job.errors import JobError, SpecError, Unavailable, without_secrets
from job.store import connection, download, probe, upload
from job.store.protocol import Capabilities, Conflict, Digest, Entry, Missing, Pieces, checked_key
from job.store.s3_errors import BROKEN, DAMAGED, code_of, explain, is_page, page_instead

# http.client takes headers that were cut off in transit for complete ones, and a body lost with them looks like an empty answer.
# These fields show that neither happened.
WITNESS = {
    "list_objects_v2": ("IsTruncated",),
    "list_multipart_uploads": ("IsTruncated",),
    "create_multipart_upload": ("UploadId",),
    "put_object": ("ETag",),
    "complete_multipart_upload": ("ETag",),
    "upload_part": ("ETag",),
    "get_object": ("ETag", "ContentLength"),
    "head_object": ("ETag", "ContentLength", "LastModified"),
}
LIST_SECONDS = 900.0
"""For one page of a listing, with all tries. A page is at most a megabyte, which takes two minutes at 10 kB/s."""


def _clock(answer: dict[str, Any]) -> float:
    """When the store answered, by its own clock, in seconds since 1970."""
    sent = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return float(parsedate_to_datetime(sent).timestamp()) if sent else time.time()


class S3Store:
    """Objects under `s3://bucket/prefix`. `sse` is "AES256", "aws:kms" or None for the bucket's default."""

    def __init__(
        self, url: str, bucket: str, prefix: str, *, sse: str | None = None, sse_kms_key_id: str | None = None
    ) -> None:
        self.url = url
        self.bucket = bucket
        self.prefix = prefix
        self.sse = sse
        self.sse_kms_key_id = sse_kms_key_id
        try:
            self.client = connection.connect()
        except (BotoCoreError, ValueError) as error:
            raise SpecError(
                f"{error}: {url} cannot be opened; check AWS_ENDPOINT_URL_S3, AWS_REGION, AWS_DEFAULT_REGION and AWS_PROFILE."
            ) from error
        self.endpoint = without_secrets(str(self.client.meta.endpoint_url))  # it may contain a user and a password
        self.part_size = upload.PART
        self.list_seconds = LIST_SECONDS
        self.pool = ThreadPoolExecutor(connection.WORKERS, thread_name_prefix="store")
        self.listing = ThreadPoolExecutor(connection.WORKERS, thread_name_prefix="listing")
        self.buffers = download.Buffers(connection.WORKERS + 2)
        self.room = threading.Semaphore(connection.WORKERS + 2)  # bodies in memory
        self._probed: Capabilities | None = None
        self.quotes = True  # whether conditions name an ETag with its quotes
        self._probing = threading.Lock()

    # Objects, small and whole

    def list(self, prefix: str = "") -> Iterator[Entry]:
        for page in self._pages("list_objects_v2", "s3:ListBucket", prefix, ContinuationToken="NextContinuationToken"):
            for item in page.get("Contents", ()):
                key = item["Key"][len(self.prefix) :]
                if key and not key.endswith("/"):  # the zero-byte "folders" that consoles make
                    version = '"' + item["ETag"].strip('"') + '"'  # as in the other answers
                    yield Entry(key, item["Size"], item["LastModified"].timestamp(), version)

    def entry(self, key: str) -> Entry:
        there = self.call("head_object", "s3:GetObject", checked_key(key))
        return Entry(key, there["ContentLength"], there["LastModified"].timestamp(), there["ETag"])

    def read(self, key: str) -> bytes:
        """Check the bytes against the ETag if that is an MD5; otherwise two reads must agree."""
        checked_key(key)
        before = None
        for _ in range(connection.ATTEMPTS):
            with contextlib.suppress(HTTPException, HTTPError, BotoCoreError, OSError):
                answer = self.call("get_object", "s3:GetObject", key)
                data = b"".join(download.arriving(answer, self.place(key)))
                etag = answer["ETag"].strip('"')
                if data == before or hashlib.md5(data, usedforsecurity=False).hexdigest() == etag:
                    return data
                before = data
        raise Unavailable(f"Reading {self.place(key)} failed repeatedly.")

    def read_piece(self, key: str, offset: int, size: int) -> bytes:
        wanted = f"bytes={offset}-{offset + size - 1}"
        for _ in range(connection.ATTEMPTS):
            with contextlib.suppress(HTTPException, HTTPError, BotoCoreError, OSError):
                answer = self.call("get_object", "s3:GetObject", checked_key(key), Range=wanted)
                return b"".join(download.arriving(answer, self.place(key)))
        raise Unavailable(f"Reading {self.place(key)} failed repeatedly.")

    def version(self, key: str) -> str:
        return str(self.call("head_object", "s3:GetObject", checked_key(key))["ETag"])

    def age(self, key: str) -> float:
        answer = self.call("head_object", "s3:GetObject", checked_key(key))
        return _clock(answer) - float(answer["LastModified"].timestamp())

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        condition = self.condition(checked_key(key), if_absent, if_match)
        try:
            return self.put(key, data, condition)
        except (Conflict, Missing):
            # Our own first try may have arrived although its answer was lost; then what is there is what we wrote.
            with contextlib.suppress(Missing):
                if self.read(key) == data:
                    return self.version(key)
            raise Conflict(f"Another writer changed {self.place(key)}.") from None

    def delete(self, keys: Iterable[str], *, if_match: Mapping[str, str] | None = None) -> None:
        """Delete one by one: the bulk call needs a checksum that older stores do not know, and our keys are few."""
        known = if_match if if_match and self.capabilities.deletes else {}

        def one(key: str) -> None:
            with contextlib.suppress(Missing):
                self.call(
                    "delete_object", "s3:DeleteObject", key, **(self.unchanged(known[key]) if key in known else {})
                )

        for done in [self.pool.submit(one, key) for key in keys]:
            done.result()

    # Files of any size

    def upload(self, path: Path, key: str, *, if_absent: bool = False, if_match: str | None = None) -> Digest:
        return upload.upload(self, path, checked_key(key), if_absent, if_match)

    def upload_pieces(
        self, make: Pieces, size: int, key: str, *, if_absent: bool = False, if_match: str | None = None
    ) -> Digest:
        with contextlib.closing(make()) as pieces:
            return upload.upload_from(self, upload.Joined(pieces), size, checked_key(key), if_absent, if_match)

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> Digest:
        return download.download(self, checked_key(key), path, sha256)

    def abort_stale(self, keys: Collection[str], older_than: float) -> int:
        count = 0
        marks = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        for page in self._pages("list_multipart_uploads", "s3:ListBucketMultipartUploads", "", **marks):
            for item in page.get("Uploads", ()):
                key = item["Key"][len(self.prefix) :]
                if key in keys and _clock(page) - item["Initiated"].timestamp() >= older_than:
                    with contextlib.suppress(Missing):
                        self.call("abort_multipart_upload", "s3:AbortMultipartUpload", key, UploadId=item["UploadId"])
                    count += 1
        return count

    def _pages(self, method: str, action: str, prefix: str, **next_from: str) -> Iterator[dict[str, Any]]:
        """Yield every page of a listing. `next_from` maps each argument of the next request to the field of the page that
        fills it."""
        further: dict[str, Any] = {}
        seen = list[Any]()
        while True:
            page = self._page(method, action, prefix, further)
            yield page
            if not page["IsTruncated"]:
                return
            further = {argument: page[field] for argument, field in next_from.items() if page.get(field)}
            if not further or further in seen:
                said = "is an old one" if further else "is missing"
                raise Unavailable(
                    f"{self.endpoint} never ends its listing of {self.place(prefix)}: a page says that more follow, and the "
                    f"marker for them {said}; the store, or a proxy before it, is broken."
                )
            seen.append(further)

    def _page(self, method: str, action: str, prefix: str, further: dict[str, Any]) -> dict[str, Any]:
        """Fetch a page in another thread and wait for it, because botocore reads a page whole, however slowly it comes."""
        asked = self.listing.submit(self.ask, method, action, prefix, Prefix=self.prefix + prefix, **further)
        try:
            page: dict[str, Any] = asked.result(self.list_seconds)
        except FutureTimeout:
            raise Unavailable(
                f"{self.endpoint} did not return a page of the listing of {self.place(prefix)} within {self.list_seconds:.0f} s."
            ) from None
        return page

    # What this store really does

    @property
    def capabilities(self) -> Capabilities:
        with self._probing:
            return self._probed or self.probe()

    def probe(self) -> Capabilities:
        """Find out anew."""
        self._probed = probe.probe(self)
        return self._probed

    def unchanged(self, etag: str) -> dict[str, str]:
        """The condition that the object is unchanged."""
        return {"IfMatch": etag if self.quotes else etag.strip('"')}

    def condition(self, key: str, if_absent: bool, if_match: str | None) -> dict[str, str]:
        """The request arguments for a condition. If the store has no conditions, the object is checked now instead."""
        if (if_absent or if_match is not None) and not self.capabilities.conditional:
            self.look_first(key, if_match)
            return {}
        return {"IfNoneMatch": "*"} if if_absent else {} if if_match is None else self.unchanged(if_match)

    def look_first(self, key: str, if_match: str | None) -> None:
        """Check, then write: the weaker guarantee. Two writers at the same moment may both pass."""
        try:
            there: str | None = self.version(key)
        except Missing:
            there = None
        if there != if_match:
            raise Conflict(f"Another writer changed {self.place(key)}.")

    # Requests

    def put(self, key: str, data: bytes, condition: dict[str, Any], *, checksums: bool | None = None) -> str:
        """Put one object in one request. The answer must show the requested encryption. Returns the version."""
        checked = self.capabilities.checksums if checksums is None else checksums
        check = upload.crc32c(data) if checked else upload.md5(data)
        for _ in range(upload.DAMAGED_TRIES):
            answer = self.call("put_object", "s3:PutObject", key, Body=data, **check, **condition, **self.encryption())
            try:
                self.check_encryption(answer, key)
            except SpecError:
                self.call("delete_object", "s3:DeleteObject", key)
                raise
            if checked or self.is_intact(answer, check["ContentMD5"]):
                return str(answer["ETag"])
            if condition:
                condition = self.unchanged(answer["ETag"])  # overwrite only our own damaged bytes
        raise self.damaged(key)

    def call(self, method: str, action: str, key: str, **arguments: Any) -> Any:
        """Make one request about one key, with retries, and with errors as sentences."""
        return self.ask(method, action, key, Key=self.prefix + key, **arguments)

    def ask(self, method: str, action: str, key: str, **arguments: Any) -> Any:
        """Make one request about what begins with `key`."""
        with self.explained(action, key):
            for attempt in itertools.count(1):
                try:
                    answer = getattr(self.client, method)(Bucket=self.bucket, **arguments)
                    # An ETag cut in two has lost its second quote.
                    whole = all(
                        name in answer and str(answer[name]).count('"') != 1 for name in WITNESS.get(method, ())
                    )
                    if whole and not is_page(answer):
                        return answer
                    if attempt == connection.ATTEMPTS:
                        raise (
                            page_instead(200, action, self.endpoint)
                            if is_page(answer)
                            else Unavailable(
                                f"The answers of {self.endpoint} to {action} lack fields that S3 requires."
                            )
                        )
                except ClientError as error:
                    code, status = code_of(error)
                    if attempt == connection.ATTEMPTS or not (code in DAMAGED or status == 409):
                        raise
                time.sleep(min(0.1 * 2**attempt, 5))
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def explained(self, action: str, key: str) -> Iterator[None]:
        try:
            yield
        except JobError:
            raise
        except BROKEN as error:
            raise explain(error, action, self.place(key), self.endpoint, self.sse) from error

    def place(self, key: str) -> str:
        return f"s3://{self.bucket}/{self.prefix}{key}"

    def encryption(self) -> dict[str, str]:
        asked = {"ServerSideEncryption": self.sse, "SSEKMSKeyId": self.sse_kms_key_id}
        return {name: value for name, value in asked.items() if value is not None}

    def check_encryption(self, answer: dict[str, Any], key: str) -> None:
        """Refuse a store that took the bytes without the requested encryption."""
        used = answer.get("ServerSideEncryption")
        key_used = str(answer.get("SSEKMSKeyId", ""))
        right_key = self.sse_kms_key_id is None or key_used.endswith(self.sse_kms_key_id.rpartition("/")[2])
        if self.sse is None or (used == self.sse and right_key):
            return
        raise SpecError(
            f"{self.endpoint} stored {self.place(key)} with encryption {used} {key_used}, not with {self.sse} "
            f"{self.sse_kms_key_id or ''} as the spec asks.".replace("  ", " ")
        )

    def is_intact(self, answer: dict[str, Any], content_md5: str) -> bool:
        """For a store that checks no checksum itself, compare our MD5 with its ETag, where that is an MD5."""
        etag = str(answer["ETag"]).strip('"')
        is_md5 = len(etag) == 32 and not answer.get("ServerSideEncryption")
        return not is_md5 or etag == base64.b64decode(content_md5).hex()

    def damaged(self, key: str) -> Unavailable:
        return Unavailable(f"{self.place(key)} repeatedly arrived damaged at {self.endpoint}.")
