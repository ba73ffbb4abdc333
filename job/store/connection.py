"""Connects to an S3 store and sends bodies to it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

ATTEMPTS, WORKERS = 8, 4
CONNECT_SECONDS, READ_SECONDS = 10, 60
"""Seconds to connect, and between two answers. A piece of a body has the first on a new connection, the second on a used one."""
PIECE = 2**18


def connect() -> Any:
    """Return a client that retries what time can cure. We send checksums ourselves, once, where the store checks them."""
    client = boto3.client(
        "s3",
        config=Config(
            retries={"mode": "adaptive", "total_max_attempts": ATTEMPTS},
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            tcp_keepalive=True,
            max_pool_connections=4 * WORKERS,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"payload_signing_enabled": False},
        ),
    )
    client.meta.events.register_last("before-call.s3", _plain_body)
    client.meta.events.register("before-send.s3", _in_pieces)
    client.meta.events.register("before-call.s3.HeadBucket", _no_region)
    return client


def _no_region(**_: Any) -> None:
    """Stop botocore from asking for the region that a redirect does not name: if that is redirected too, it asks again
    endlessly."""
    nothing: Any = {"ResponseMetadata": {"HTTPHeaders": {}}}
    raise ClientError(nothing, "HeadBucket")


def _plain_body(params: dict[str, Any], **_: Any) -> None:
    """Send bytes as bytes. botocore would make a file of them, wait for permission to send it, and send 16 KiB at a time."""
    params["headers"].pop("Expect", None)
    if isinstance(params.get("body"), io.BytesIO):
        params["body"] = params["body"].getvalue()


class _Pieces:
    """A body sent piece by piece. A socket's timeout covers all that it is given at once, so a slow connection has it for each
    piece, and one that takes next to nothing is still given up."""

    def __init__(self, body: bytes) -> None:
        self._body = memoryview(body)

    def __len__(self) -> int:
        return len(self._body)

    def __iter__(self) -> Iterator[memoryview]:
        return (self._body[start : start + PIECE] for start in range(0, len(self._body), PIECE))

    def seek(self, _start: int) -> None:
        """Called by botocore before a retry; every try starts at the beginning anyway."""


def _in_pieces(request: Any, **_: Any) -> None:
    if isinstance(request.body, bytes) and len(request.body) > PIECE:
        request.body = _Pieces(request.body)
