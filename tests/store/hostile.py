"""Stores that misbehave, each kind against a real HTTP server; prints how often each was asked and what became of it.

python -m tests.store.hostile
"""

from __future__ import annotations

import hashlib
import socket
import socketserver
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest

from job.errors import JobError
from job.store import Capabilities, check_writable, open_store
from job.store.s3 import S3Store
from tests.s3 import SMALL_PART, address, make_bucket, moto, point_at
from tests.store.proxy import Message, Proxy, answer

Before = Callable[[Message], bytes | None]
Operation = Callable[[S3Store, Path], object]
HELD = b"held by the store " * 20_000
"""The object `there`, of several parts."""


def listing(store: S3Store, _: Path) -> object:
    return list(store.list("a"))


def uploads(store: S3Store, _: Path) -> object:
    return store.abort_stale(["there"], 0)


def read(store: S3Store, _: Path) -> object:
    assert store.read("there") == HELD
    return None


def piece(store: S3Store, _: Path) -> object:
    assert store.read_piece("there", 7, 3) == HELD[7:10]
    return None


def download(store: S3Store, folder: Path) -> object:
    store.download("there", folder / "here")
    assert (folder / "here").read_bytes() == HELD
    return None


def promised(store: S3Store, folder: Path) -> object:
    store.part_size = len(HELD)
    return store.download("there", folder / "here", sha256=hashlib.sha256(HELD).hexdigest())


def version(store: S3Store, _: Path) -> object:
    return store.version("there")


def write(store: S3Store, _: Path) -> object:
    return store.write("new", b"small")


def create(store: S3Store, _: Path) -> object:
    return store.write("new", b"small", if_absent=True)


def upload(store: S3Store, folder: Path) -> object:
    (folder / "file").write_bytes(HELD)
    return store.upload(folder / "file", "new")


def large(store: S3Store, folder: Path) -> object:
    store.part_size = 2**24
    (folder / "file").write_bytes(bytes(2**24))
    return store.upload(folder / "file", "new")


def delete(store: S3Store, _: Path) -> object:
    return store.delete(["there"])


def says(status: str, code: str = "", *headers: str) -> Before:
    body = f"<Error><Code>{code}</Code><Message>m</Message></Error>" if code else ""
    return lambda request: answer(status, body, "x-amz-request-id: 1", *headers)


def page(status: str, *headers: str) -> Before:
    """What a proxy, a login page or a web site sends."""
    body = "<!doctype html><html><body>Please sign in<br></body></html>"
    whole = answer(status, body, *headers).replace(b"application/xml", b"text/html; charset=utf-8")
    return lambda request: whole.partition(body.encode())[0] if request.first.startswith("HEAD") else whole


def pages(*tokens: str, tag: str = "ListBucketResult", mark: str = "NextContinuationToken") -> Before:
    """A listing whose pages name these tokens for the next, over and over, and never end."""
    count = iter(range(10**9))

    def before(_: Message) -> bytes:
        token = tokens[next(count) % len(tokens)] if tokens else ""
        more = f"<{mark}>{token}</{mark}>" if tokens else ""
        return answer("200 OK", f"<{tag}><IsTruncated>true</IsTruncated>{more}</{tag}>", "x-amz-request-id: 1")

    return before


def only(verb: str, before: Before) -> Before:
    return lambda request: before(request) if request.first.startswith(verb) else None


def first(count: int, before: Before) -> Before:
    """Misbehave so many times, then never again."""
    left = iter(range(count))
    return lambda request: before(request) if next(left, None) is not None else None


def bytes_of(data: bytes, *headers: str) -> Before:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(data)}", 'ETag: "0"', *headers, "\r\n"]
    return lambda request: "\r\n".join(lines).encode() + data


DRIP = "drip"
"""A server that sends its head, and then a byte each twentieth of a second."""
SINK = "sink"
"""A server that reads nothing of a body."""


SLOW = "slow"
"""A proxy that takes longer over a body than a socket has for what it is given at once."""


class Kind(NamedTuple):
    """A way to misbehave during an operation; the exit code that follows (0: it did what it should), and what is said."""

    name: str
    operation: Operation
    fault: Before | str
    """What is answered instead; or a fault of the proxy's, on every request or, behind a colon, on one."""
    code: int
    says: str = ""


REGION = "x-amz-bucket-region: eu-west-3"
LOGIN = "Location: http://login.example.org/?next=s3"
KINDS = [
    Kind("a listing repeats its token", listing, pages("t"), 69, "never ends its listing .* is an old one"),
    Kind("a listing goes in a circle", listing, pages("t", "u", "v"), 69, "never ends its listing"),
    Kind("a listing goes on without a token", listing, pages(), 69, "never ends its listing .* is missing"),
    Kind(
        "uploads are listed in a circle",
        uploads,
        pages("k", tag="ListMultipartUploadsResult", mark="NextKeyMarker"),
        69,
        "ends",
    ),
    Kind(
        "a listing has no end mark",
        listing,
        bytes_of(b"<ListBucketResult></ListBucketResult>"),
        69,
        "lack fields that S3 requires",
    ),
    Kind("a listing is broken XML", listing, bytes_of(b"<ListBucketResult><Cont"), 69, "s3:ListBucket"),
    Kind("a listing drips", listing, DRIP, 69, "did not return a page of the listing"),
    Kind("a web page instead of a listing", listing, page("200 OK"), 69, "with a web page"),
    Kind(
        "a listing in another region",
        listing,
        says("301 Moved", "PermanentRedirect", REGION),
        78,
        "region eu-west-3; set AWS_REGION",
    ),
    Kind("a listing once too often", listing, first(1, says("503 Slow Down", "SlowDown")), 0),
    Kind("an object drips", read, DRIP, 69, "arrives too slowly"),
    Kind("a piece drips", piece, DRIP, 69, "arrives too slowly"),
    Kind("an object is cut each time", read, "truncated", 69, "failed repeatedly"),
    Kind("answers are cut each time", download, "truncated", 69, "lack fields|failed repeatedly"),
    Kind("the whole for a part", download, only("GET", bytes_of(HELD)), 69, "failed repeatedly"),
    Kind("bits flip in each answer", promised, only("GET", bytes_of(HELD[::-1])), 65, "has SHA-256"),
    Kind("a web page instead of an object", read, page("200 OK"), 69, "with a web page"),
    Kind("a web site says that nothing is there", read, page("404 Not Found"), 78, "web site or a console"),
    Kind("a proxy's refusal of a HEAD", version, page("403 Forbidden"), 77, "a proxy refuses it"),
    Kind("no reason to a HEAD", version, says("400 Bad Request"), 78, "usually AWS_REGION"),
    Kind("another region to a HEAD", version, says("400 Bad Request", "", REGION), 78, "region eu-west-3"),
    Kind(
        "a wrong region", write, says("400 Bad Request", "AuthorizationHeaderMalformed", REGION), 78, "region eu-west-3"
    ),
    Kind(
        "a temporary redirect",
        write,
        says("307 Temporary Redirect", "TemporaryRedirect", REGION, LOGIN),
        78,
        "region eu-west-3",
    ),
    Kind("a login page", write, page("302 Found", LOGIN), 69, "with a web page|redirects to login.example.org"),
    Kind(
        "a login page by 307",
        write,
        lambda _: answer("307 Temporary Redirect", "", LOGIN),
        69,
        "redirects to login.example.org",
    ),
    Kind(
        "http is sent to https",
        write,
        lambda _: answer("308 Permanent Redirect", "", "Location: https://127.0.0.1/b"),
        78,
        "AWS_ENDPOINT_URL_S3 with https",
    ),
    Kind(
        "no length arrives",
        write,
        says("411 Length Required", "MissingContentLength"),
        78,
        "received no Content-Length",
    ),
    Kind("not implemented", write, says("501 Not Implemented", "NotImplemented"), 78, "does not offer s3:PutObject"),
    Kind("asks for patience", write, says("503 Slow Down", "SlowDown"), 69, "run fewer jobs on it at once"),
    Kind(
        "too many requests", write, says("429 Too Many Requests", "TooManyRequests"), 69, "run fewer jobs on it at once"
    ),
    Kind("a gateway's page", write, page("502 Bad Gateway"), 69, "with a web page"),
    Kind("a proxy wants a password", write, says("407 Proxy Authentication Required"), 77, "requires credentials"),
    Kind("a proxy's refusal", write, page("403 Forbidden"), 77, "a proxy refuses it"),
    Kind("a page for an object written", write, page("200 OK"), 69, "with a web page"),
    Kind("a conflict without end", write, says("409 Conflict", "OperationAborted"), 69, "409 OperationAborted"),
    Kind("credentials expire", write, says("403 Forbidden", "ExpiredToken"), 77, "expired"),
    Kind("a disk of the store is full", write, says("507 Insufficient Storage", "InsufficientStorage"), 69, "507"),
    Kind("the answer to a create is lost", create, "reset-after:1", 0),
    Kind("a body is not read", large, SINK, 69, "accepted no data"),
    Kind("a part is refused once", upload, only("PUT", first(1, says("500 Internal Error", "InternalError"))), 0),
    Kind(
        "an upload without a name",
        upload,
        only("POST", bytes_of(b"<InitiateMultipartUploadResult/>", "x-amz-request-id: 1")),
        69,
        "lack fields",
    ),
    Kind(
        "an upload that never completes",
        upload,
        only("POST", first(9, says("500 Internal Error", "InternalError"))),
        69,
        "500",
    ),
    Kind("a line is slow", large, SLOW, 0),
    Kind("nothing may be deleted", delete, says("403 Forbidden", "AccessDenied"), 77, "do not allow s3:DeleteObject"),
    Kind("deleting resets the connection", delete, "reset-before", 69, "failed after retries"),
]


@contextmanager
def raw(kind: str) -> Iterator[tuple[str, list[str]]]:
    """The url of a server that drips or sinks, and what was asked of it."""
    seen: list[str] = []
    over = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            data = b""
            while b"\r\n\r\n" not in data:
                if not (more := self.request.recv(4096)):
                    return
                data += more
            seen.append(data.split(b"\r\n")[0].decode())
            if kind == SINK:
                over.wait(60)
                return
            self.request.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 5000\r\nETag: "0"\r\nx-amz-request-id: 1\r\n\r\n')
            while not over.wait(0.05):
                self.request.sendall(b" ")

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, allow_reuse_address = True, True

        def handle_error(self, *_: object) -> None:
            """Who asked has gone."""

    with Server(("127.0.0.1", 0), Handler) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", seen
        finally:
            over.set()
            server.shutdown()


def tried(
    kind: Kind, url: str, upstream: str, known: Capabilities, patch: pytest.MonkeyPatch
) -> Callable[[], tuple[int, int, str, float]]:
    """Opens the store. What is returned runs the operation and gives the exit code, the requests, what was said and seconds."""
    away = raw(str(kind.fault)) if kind.fault in (DRIP, SINK) else nullcontext()
    place = away.__enter__()
    proxy = Proxy(address(upstream))
    proxy.__enter__()
    point_at(place[0] if place else proxy.url, patch)
    store = open_store(url)
    assert isinstance(store, S3Store)
    store.part_size, store.list_seconds, store._probed = SMALL_PART, 3.0, known

    def run() -> tuple[int, int, str, float]:
        if callable(kind.fault):
            proxy.before = kind.fault
        elif kind.fault == SLOW:
            proxy.rate = 3e6
        elif not place:
            proxy.fault, _, at = kind.fault.partition(":")
            proxy.at = int(at or -1)
        began, code, said = time.monotonic(), 0, ""
        with tempfile.TemporaryDirectory() as folder:
            try:
                kind.operation(store, Path(folder))
            except JobError as error:
                code, said = error.exit_code, str(error)
            except BaseException as error:
                code, said = 70, f"{type(error).__name__} {error}"
        seconds = time.monotonic() - began
        away.__exit__(None, None, None)
        proxy.__exit__(None, None, None)
        return code, len(place[1] if place else proxy.seen), said, seconds

    return run


def try_all(upstream: str, patch: pytest.MonkeyPatch) -> list[tuple[Kind, int, int, str, float]]:
    """Every kind, all at once: most of their time they wait."""
    point_at(upstream, patch)
    bucket = make_bucket()
    urls = [f"s3://{bucket}/{number}" for number in range(len(KINDS))]
    plain = open_store(f"s3://{bucket}")
    known = check_writable(plain)
    for number in range(len(KINDS)):
        plain.write(f"{number}/there", HELD)
    patch.setattr("job.store.connection.ATTEMPTS", 2)
    patch.setattr("job.store.download.PATIENCE", 1.0)  # on a busy machine a tenth of that is lost at times
    patch.setattr("job.store.download.FLOOR", 10**9)
    patch.setattr("job.store.connection.CONNECT_SECONDS", 3)
    ready = [(kind, tried(kind, url, upstream, known, patch)) for kind, url in zip(KINDS, urls, strict=True)]
    with ThreadPoolExecutor(len(ready)) as pool:
        return [(kind, *future.result()) for kind, future in [(kind, pool.submit(run)) for kind, run in ready]]


def table(results: list[tuple[Kind, int, int, str, float]]) -> str:
    lines = [f"{'the store, or what is on the way':38} {'operation':10} asked  code"]
    for kind, code, asked, said, _ in results:
        wrong = "" if code == kind.code else f" and not {kind.code}"
        lines.append(f"{kind.name:38} {kind.operation.__name__:10} {asked:5}  {code}{wrong} {said[:150]}")
    failed = sum(code != kind.code for kind, code, *_ in results)
    return "\n".join([*lines, f"{len(results)} kinds, {failed} ended with another code than they should"])


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch, moto() as upstream:
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        found = try_all(upstream, patch)
    print(table(found))
    raise SystemExit(any(code != kind.code for kind, code, *_ in found))
