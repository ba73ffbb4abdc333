"""Fetches images behind URLs in rows once to scratch, and reads images from shards too large to fetch."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import lru_cache, partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection, IncompleteRead, InvalidURL
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from job.errors import DataError, SpecError, Unavailable
from job.store import Missing, Store, open_store
from job.store.disk import disk

TRIES = 4
TIMEOUT = 30.0
DEADLINE = 300.0
"""Seconds to fetch an image, redirects and retries included."""
LARGEST = 500_000_000
CHUNK = 2**20
NOT_THERE = "there is no image at its URL"
NO_HOST = "the host in its URL does not exist"
INWARD = "its URL leads to an address that is not public; name its host in dataset.image_hosts to allow that"
NAT64 = IPv6Network("64:ff9b::/96")
NAT64_LOCAL = IPv6Network("64:ff9b:1::/48")


class Unfetchable(DataError):
    """Why a retry will not fetch the image behind a URL either. The text holds nothing of the URL."""


class Inward(Exception):
    """The address connected to is not public."""


def fetched(url: str, folder: Path, hosts: Collection[str] = ()) -> Path:
    """Returns the file that holds the content of `url`. `hosts`, in lower case, may have addresses that are not public.

    Raises Unavailable if the host does not answer, Unfetchable if there is nothing to fetch.
    """
    path = folder / hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
    if path.exists():
        return path
    with disk(path):
        folder.mkdir(parents=True, exist_ok=True)
    root, _, key = url.rpartition("/")
    if url.startswith("s3://"):
        try:
            open_store(root).download(key, path)
        except (Missing, SpecError):  # SpecError: the URL names no bucket
            raise Unfetchable(NOT_THERE) from None
        return path
    part = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    try:
        _fetch(url, part, hosts)
        with disk(path):
            part.rename(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def piece(url: str, offset: int, size: int) -> bytes:
    """Reads bytes of an object in an `s3://` store. Raises Unavailable if the store does not answer, Missing if the object is
    gone."""
    root, _, key = url.rpartition("/")
    return _store(root, os.getpid()).read_piece(key, offset, size)


@lru_cache(16)
def _store(root: str, _process: int) -> Store:
    """One store per process: a connection must not be shared with the process that forked this one."""
    return open_store(root)


def _fetch(url: str, path: Path, hosts: Collection[str]) -> None:
    """Writes the content of an http URL to `path`. Raises Unfetchable for what a retry will not fetch either."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        raise Unfetchable(NOT_THERE) from None
    if not host:
        raise Unfetchable(NOT_THERE)
    if parts.username or parts.password:
        raise Unfetchable("its URL contains a user or password, which are never sent; remove them")
    until = time.monotonic() + DEADLINE
    for attempt in range(TRIES):
        try:
            return _save(url, path, hosts, until)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 and error.code != 429:
                raise Unfetchable(NOT_THERE) from None
            reason = f"answers {error.code}"
        except (ValueError, InvalidURL):
            raise Unfetchable(NOT_THERE) from None
        except Inward:
            raise Unfetchable(INWARD) from None
        except (OSError, HTTPException) as error:
            cause = getattr(error, "reason", error)
            if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME:
                raise Unfetchable(NO_HOST) from None  # if name servers cannot answer now, errno differs
            reason = f"does not answer ({type(error).__name__})"
        if time.monotonic() > until:
            reason = f"does not deliver a whole image within {DEADLINE:.0f} s"
            break
        time.sleep(0.2 * 4**attempt)
    raise Unavailable(f"dataset: {host}, which has images of rows, {reason}; run again, or fix the rows")


def _save(url: str, path: Path, hosts: Collection[str], until: float) -> None:
    """Makes one attempt. Shuts its connections at `until`, even while data arrives."""
    watched: list[socket.socket] = []
    end = threading.Timer(max(until - time.monotonic(), 0), _hang_up, [watched])
    end.daemon = True
    end.start()
    opener = urllib.request.OpenerDirector()  # that of `build_opener` would also follow redirects to ftp://
    for handler in (
        urllib.request.ProxyHandler(),
        _Web(partial(_guard, hosts, until, watched), hosts),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    try:
        answer = opener.open(url, timeout=TIMEOUT)
        if answer is None:
            raise Unfetchable(NOT_THERE)
        with answer:
            promised = int(answer.headers.get("Content-Length") or 0)
            got = _copy(answer, path) if promised <= LARGEST else promised
            if got > LARGEST:
                raise Unfetchable(f"it is larger than {LARGEST / 1e6:.0f} MB")
            if got < promised or time.monotonic() > until:
                raise IncompleteRead(b"", promised - got)
    finally:
        end.cancel()
        for each in watched:
            each.close()


def _hang_up(connections: list[socket.socket]) -> None:
    for each in connections:
        with suppress(OSError):  # it is closed already
            each.shutdown(socket.SHUT_RDWR)


def _copy(answer: Any, path: Path) -> int:
    """Returns the bytes written, at most one chunk over `LARGEST`."""
    got = 0
    with disk(path), path.open("wb") as file:
        for chunk in _chunks(answer):
            got += file.write(chunk)
            if got > LARGEST:
                break
    return got


def _chunks(answer: Any) -> Iterator[bytes]:
    """Yields the body. A broken connection is not a fault of the disk that the body goes to."""
    while True:
        try:
            chunk = answer.read(CHUNK)
        except OSError as error:
            raise IncompleteRead(b"") from error
        if not chunk:
            return
        yield chunk


class _Web(urllib.request.HTTPHandler):
    """Resolves a host before it connects, and has `guard` check the address connected to, unless that is a proxy."""

    def __init__(self, guard: Callable[..., None], hosts: Collection[str]) -> None:
        super().__init__()
        self.guard, self.hosts = guard, hosts

    https_request = urllib.request.HTTPHandler.http_request

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(partial(_Plain, guard=self._guard_for(request)), request)

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(partial(_Tls, guard=self._guard_for(request)), request)

    def _guard_for(self, request: urllib.request.Request) -> Callable[..., None]:
        parts = urlsplit(request.full_url)
        if parts.username or parts.password:  # a redirect to such a URL
            raise Unfetchable(NOT_THERE)
        if (host := str(parts.hostname)) not in self.hosts:
            _refuse_inward(host)
        return partial(self.guard, proxy=request.host != parts.netloc)


class _Plain(HTTPConnection):
    """Calls `guard` once connected, before a byte is sent."""

    def __init__(self, *arguments: Any, guard: Callable[..., None], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.guard = guard

    def connect(self) -> None:
        super().connect()
        self.guard(self)


class _Tls(HTTPSConnection, _Plain):
    """`HTTPSConnection.connect` starts TLS after `_Plain.connect` returns."""


def _guard(
    hosts: Collection[str], until: float, watched: list[socket.socket], connection: HTTPConnection, proxy: bool
) -> None:
    """Checks the address connected to, not one resolved before: two lookups of a name may differ."""
    watched.append(connection.sock.dup())
    if not (proxy or connection.host.lower() in hosts or is_public(connection.sock.getpeername()[0])):
        raise Inward
    if time.monotonic() > until:
        raise TimeoutError


def _refuse_inward(host: str) -> None:
    """Raises Inward if the host's address, as far as it is known here, is not public."""
    with suppress(socket.gaierror, UnicodeError):
        if not all(is_public(str(each[4][0])) for each in socket.getaddrinfo(host, None)):
            raise Inward


def is_public(address: str) -> bool:
    """Whether an address is on the public internet: not of this machine, its links or its networks, and not multicast. For an
    IPv4 address embedded in IPv6 (mapped, NAT64, 6to4), the embedded address counts."""
    there: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    if isinstance(there, IPv6Address):
        embedded = there.ipv4_mapped or there.sixtofour
        if there in NAT64:
            embedded = IPv4Address(int(there) & 0xFFFFFFFF)
        if embedded is not None:
            return is_public(str(embedded))
        if there in NAT64_LOCAL or there.is_site_local:
            return False
    return there.is_global and not (there.is_multicast or there.is_reserved)
