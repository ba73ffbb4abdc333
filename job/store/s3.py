"""The door to S3 and everything that speaks it: AWS, Ceph, MinIO, R2 and the rest.

Credentials, endpoint, region and authorities come from the platform's own variables, files and roles, as boto3 finds
them: AWS_ENDPOINT_URL_S3, AWS_REGION, AWS_CA_BUNDLE, AWS_ROLE_ARN with AWS_WEB_IDENTITY_TOKEN_FILE, AWS_CONFIG_FILE
(where `s3 = addressing_style = virtual` chooses virtual-host addresses for a custom endpoint).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import itertools
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from urllib3.exceptions import HTTPError

from job.errors import JobError, SpecError, Unavailable
from job.store import transfer
from job.store.faults import DAMAGED, code_of, explain
from job.store.protocol import Capabilities, Conflict, Digest, Entry, Missing, checked_key

# Headers that were cut off on the way look to http.client like the end of them, and a body that was lost with them looks
# like an empty answer; these show that neither was.
WITNESS = {
    "list_objects_v2": ("IsTruncated",),
    "list_multipart_uploads": ("IsTruncated",),
    "create_multipart_upload": ("UploadId",),
    "put_object": ("ETag",),
    "upload_part": ("ETag",),
    "get_object": ("ETag", "ContentLength"),
    "head_object": ("ETag", "ContentLength", "LastModified"),
}
BROKEN = (BotoCoreError, ClientError, HTTPError, HTTPClientError, OSError)


def connect() -> Any:
    """A client that retries what time can cure. Checksums are ours to send, once, where the store checks them."""
    client = boto3.client(
        "s3",
        config=Config(
            retries={"mode": "adaptive", "total_max_attempts": transfer.ATTEMPTS},
            connect_timeout=10,
            read_timeout=60,
            tcp_keepalive=True,
            max_pool_connections=4 * transfer.WORKERS,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"payload_signing_enabled": False},
        ),
    )
    client.meta.events.register_last("before-call.s3", _plain_body)
    return client


def _plain_body(params: dict[str, Any], **_: Any) -> None:
    """Send bytes as bytes: botocore makes a file of them, waits for leave to send it, and sends it 16 KiB at a time."""
    params["headers"].pop("Expect", None)
    if isinstance(params.get("body"), io.BytesIO):
        params["body"] = params["body"].getvalue()


def _clock(answer: dict[str, Any]) -> float:
    """When the store says that it answered, in seconds since 1970."""
    sent = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return float(parsedate_to_datetime(sent).timestamp()) if sent else time.time()


class S3Store:
    """Objects under `s3://bucket/prefix`. `sse` is "AES256", "aws:kms" or None for what the bucket does by itself."""

    def __init__(
        self, url: str, bucket: str, prefix: str, *, sse: str | None = None, sse_kms_key_id: str | None = None
    ) -> None:
        self.url = url
        self.bucket = bucket
        self.prefix = prefix
        self.sse = sse
        self.sse_kms_key_id = sse_kms_key_id
        try:
            self.client = connect()
        except (BotoCoreError, ValueError) as error:
            raise SpecError(
                f"{error}: {url} cannot be opened; see AWS_ENDPOINT_URL_S3, AWS_REGION, AWS_DEFAULT_REGION and AWS_PROFILE."
            ) from error
        self.endpoint = str(self.client.meta.endpoint_url)
        self.part_size = transfer.PART
        self.pool = ThreadPoolExecutor(transfer.WORKERS, thread_name_prefix="store")
        self.buffers = transfer.Buffers(transfer.WORKERS + 2)
        self.room = threading.Semaphore(transfer.WORKERS + 2)  # bodies in memory
        self._probed: Capabilities | None = None
        self._quotes = True  # whether conditions name an ETag with its quotes
        self._probing = threading.Lock()

    # Objects, small and whole

    def list(self, prefix: str = "") -> Iterator[Entry]:
        for page in self._pages("list_objects_v2", "s3:ListBucket", prefix, ContinuationToken="NextContinuationToken"):
            for item in page.get("Contents", ()):
                key = item["Key"][len(self.prefix) :]
                if key and not key.endswith("/"):  # the zero-byte "folders" that consoles make
                    yield Entry(key, item["Size"], item["LastModified"].timestamp())

    def read(self, key: str) -> bytes:
        """The bytes must match the ETag where that is an MD5; where it is something else, two reads must agree."""
        checked_key(key)
        before = None
        for _ in range(transfer.ATTEMPTS):
            with contextlib.suppress(HTTPError, BotoCoreError, OSError):
                answer = self.call("get_object", "s3:GetObject", key)
                data: bytes = answer["Body"].read()
                etag = answer["ETag"].strip('"')
                if data == before or hashlib.md5(data, usedforsecurity=False).hexdigest() == etag:
                    return data
                before = data
        raise Unavailable(f"Reading {self.place(key)} broke off again and again.")

    def read_piece(self, key: str, offset: int, size: int) -> bytes:
        wanted = f"bytes={offset}-{offset + size - 1}"
        for _ in range(transfer.ATTEMPTS):
            with contextlib.suppress(HTTPError, BotoCoreError, OSError):
                answer = self.call("get_object", "s3:GetObject", checked_key(key), Range=wanted)
                data: bytes = answer["Body"].read()
                if len(data) == answer["ContentLength"]:
                    return data
        raise Unavailable(f"Reading {self.place(key)} broke off again and again.")

    def version(self, key: str) -> str:
        return str(self.call("head_object", "s3:GetObject", checked_key(key))["ETag"])

    def age(self, key: str) -> float:
        answer = self.call("head_object", "s3:GetObject", checked_key(key))
        return _clock(answer) - float(answer["LastModified"].timestamp())

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        checked_key(key)
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        if (if_absent or if_match is not None) and not self.capabilities.conditional:
            self._look_first(key, if_match)
            condition = {}
        elif if_match is not None:
            condition = self._is(if_match)
        try:
            return self.put(key, data, condition)
        except (Conflict, Missing):
            # Our own first try may have arrived while its answer was lost; then what is there is what we wrote.
            with contextlib.suppress(Missing):
                if self.read(key) == data:
                    return self.version(key)
            raise Conflict(f"Another writer changed {self.place(key)}.") from None

    def delete(self, keys: Iterable[str]) -> None:
        """One by one: the bulk call wants a checksum that older stores do not know, and ours are few."""
        for done in [self.pool.submit(self.call, "delete_object", "s3:DeleteObject", key) for key in keys]:
            done.result()

    # Files of any size

    def upload(self, path: Path, key: str) -> Digest:
        return transfer.upload(self, path, checked_key(key))

    def upload_pieces(self, pieces: Iterator[memoryview], size: int, key: str) -> Digest:
        return transfer.upload_from(self, transfer.Joined(pieces), size, checked_key(key))

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> Digest:
        return transfer.download(self, checked_key(key), path, sha256)

    def abort_stale(self, prefix: str, older_than: float) -> int:
        count = 0
        marks = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        for page in self._pages("list_multipart_uploads", "s3:ListBucketMultipartUploads", prefix, **marks):
            for item in page.get("Uploads", ()):
                if _clock(page) - item["Initiated"].timestamp() >= older_than:
                    key = item["Key"][len(self.prefix) :]
                    with contextlib.suppress(Missing):
                        self.call("abort_multipart_upload", "s3:AbortMultipartUpload", key, UploadId=item["UploadId"])
                    count += 1
        return count

    def _pages(self, method: str, action: str, prefix: str, **next_from: str) -> Iterator[dict[str, Any]]:
        """Every page of a listing; `next_from` says which field of a page goes into which argument for the next."""
        page = self.ask(method, action, prefix, Prefix=self.prefix + prefix)
        yield page
        while page["IsTruncated"]:
            further = {argument: page[field] for argument, field in next_from.items()}
            page = self.ask(method, action, prefix, Prefix=self.prefix + prefix, **further)
            yield page

    # What this store really does

    @property
    def capabilities(self) -> Capabilities:
        with self._probing:
            if self._probed is None:
                self._probed = self.probe()
            return self._probed

    def probe(self) -> Capabilities:
        """Learn on a small object of our own: conditions, checksums, encryption."""
        key = f"probe-{secrets.token_hex(6)}"
        try:
            self._probed = self._try_out(key)
        except BaseException:
            with contextlib.suppress(JobError):
                self.delete([key])
            raise
        self.delete([key])
        return self._probed

    def _try_out(self, key: str) -> Capabilities:
        weaker = []
        checksums = self._checks_checksums(key)
        if not checksums:
            weaker.append(
                f"{self.endpoint} checks no CRC32C, so an MD5 goes with each part and is compared with the ETag."
            )
        etag = self.put(key, b"a", {}, checksums=checksums)
        self.read(key)
        # What must be refused, and then what must not be: Ceph 16 takes an ETag only without its quotes.
        conditional = self._refuses(key, {"IfNoneMatch": "*"}) and self._refuses(key, {"IfMatch": '"0"'})
        self._quotes = not self._refuses(key, {"IfMatch": etag})
        if not self._quotes:
            conditional = conditional and not self._refuses(key, self._is(self.version(key)))
        if not conditional:
            weaker.append(f"{self.endpoint} has no conditional writes, so two writers may not see each other.")
        return Capabilities(conditional, checksums, tuple(weaker))

    def _checks_checksums(self, key: str) -> bool:
        """True if a wrong checksum is refused and a right one is not."""
        for data, refused in ((b"right", False), (b"wrong", True)):
            try:
                self.client.put_object(
                    Bucket=self.bucket,
                    Key=self.prefix + key,
                    Body=data,
                    **transfer.crc32c(b"right"),
                    **self.encryption(),
                )
            except ClientError as error:
                if code_of(error)[1] not in (400, 501):
                    raise explain(error, "s3:PutObject", self.place(key), self.endpoint, self.sse) from error
                if not refused:
                    return False
            except BROKEN as error:
                raise explain(error, "s3:PutObject", self.place(key), self.endpoint, self.sse) from error
            else:
                if refused:
                    return False
        return True

    def _refuses(self, key: str, condition: dict[str, str]) -> bool:
        try:
            self.client.put_object(
                Bucket=self.bucket, Key=self.prefix + key, Body=b"a", **condition, **self.encryption()
            )
        except ClientError as error:
            return code_of(error)[1] == 412
        except BROKEN as error:
            raise explain(error, "s3:PutObject", self.place(key), self.endpoint, self.sse) from error
        return False

    def _is(self, etag: str) -> dict[str, str]:
        """The condition that the object still is what it was."""
        return {"IfMatch": etag if self._quotes else etag.strip('"')}

    def _look_first(self, key: str, if_match: str | None) -> None:
        """The weaker guarantee: look, then write. Two writers in the same moment may both pass."""
        try:
            there: str | None = self.version(key)
        except Missing:
            there = None
        if there != if_match:
            raise Conflict(f"Another writer changed {self.place(key)}.")

    # The one way to call

    def put(self, key: str, data: bytes, condition: dict[str, Any], *, checksums: bool | None = None) -> str:
        """One object in one request; the answer must show the encryption asked for. Returns the version."""
        checked = self.capabilities.checksums if checksums is None else checksums
        check = transfer.crc32c(data) if checked else transfer.md5(data)
        for _ in range(transfer.DAMAGED_TRIES):
            answer = self.call("put_object", "s3:PutObject", key, Body=data, **check, **condition, **self.encryption())
            try:
                self.check_encryption(answer, key)
            except SpecError:
                self.call("delete_object", "s3:DeleteObject", key)
                raise
            if checked or self.is_intact(answer, check["ContentMD5"]):
                return str(answer["ETag"])
            if condition:
                condition = self._is(answer["ETag"])  # over our own damaged bytes, and nobody else's
        raise self.damaged(key)

    def call(self, method: str, action: str, key: str, **arguments: Any) -> Any:
        """One request about one key, retried, with its errors as sentences."""
        return self.ask(method, action, key, Key=self.prefix + key, **arguments)

    def ask(self, method: str, action: str, key: str, **arguments: Any) -> Any:
        """One request about what begins with `key`."""
        with self.explained(action, key):
            for attempt in itertools.count(1):
                try:
                    answer = getattr(self.client, method)(Bucket=self.bucket, **arguments)
                    # An ETag cut in two has lost its second quote.
                    if all(name in answer and str(answer[name]).count('"') != 1 for name in WITNESS.get(method, ())):
                        return answer
                    if attempt == transfer.ATTEMPTS:
                        raise Unavailable(f"The answers of {self.endpoint} to {action} lack what S3 promises.")
                except ClientError as error:
                    code, status = code_of(error)
                    if attempt == transfer.ATTEMPTS or not (code in DAMAGED or status == 409):
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
        """Refuse a store that took the bytes without the encryption that was asked for."""
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
        """For a store that checks no checksum itself: its MD5 against ours, where its ETag is one."""
        etag = str(answer["ETag"]).strip('"')
        is_md5 = len(etag) == 32 and not answer.get("ServerSideEncryption")
        return not is_md5 or etag == base64.b64decode(content_md5).hex()

    def damaged(self, key: str) -> Unavailable:
        return Unavailable(f"{self.place(key)} arrived damaged at {self.endpoint} again and again.")
