"""Pictures behind URLs: which addresses are asked, how long and how much, and what is kept."""

from __future__ import annotations

import http.server
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from job.config.schema import DatasetSpec
from job.data import remote
from job.data.images import Files, load
from job.data.pixels import BadRow
from job.data.remote import INWARD, Unfetchable, fetched, is_public
from job.errors import Unavailable

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


class Site:
    """A web server on the loopback, with what was asked of it by name and what it answers."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers: dict[str, Answer] = {}
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append(f"{self.headers['Host']}{self.path}")
                site.answers[self.path.partition("?")[0]](self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # who asked has hung up
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


def sends(data: bytes, *headers: tuple[str, str], status: int = 200) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers or (("Content-Length", str(len(data))),):
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def drips(head: bytes) -> Answer:
    """A byte each hundredth of a second, for as long as anybody listens, behind `head`."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.wfile.write(head)
        for _ in range(3000):
            handler.wfile.write(b"x")
            time.sleep(0.01)

    return answer


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    site.answers["/a.png"] = sends(png())
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name that ends with .test is one of this machine's."""
    real = socket.getaddrinfo

    def look_up(host: Any, *rest: Any, **more: Any) -> Any:
        return real("127.0.0.1" if str(host).endswith(".test") else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def test_a_host_with_an_inner_address_is_asked_only_where_it_is_named(site: Site, named: None, tmp_path: Path) -> None:
    for host in ("127.0.0.1", "localhost", "127.1", "2130706433", "0.0.0.0", "images.test"):
        with pytest.raises(Unfetchable, match=INWARD):
            fetched(site.url("/a.png", host), tmp_path, ["other.test"])
    assert site.asked == []
    assert list(tmp_path.iterdir()) == []
    assert fetched(site.url("/a.png", "Images.test"), tmp_path, ["images.test"]).read_bytes() == png()


def test_a_redirect_leads_only_where_a_row_might(site: Site, named: None, tmp_path: Path) -> None:
    for target in (
        site.url("/a.png"),
        site.url("/a.png", "other.test"),
        "ftp://images.test/a.png",
        "file:///etc/hosts",
    ):
        site.answers["/away"] = sends(b"", ("Location", target), ("Content-Length", "0"), status=302)
        with pytest.raises(Unfetchable):
            fetched(site.url("/away", "images.test"), tmp_path, ["images.test"])
    assert {line.partition("/")[2] for line in site.asked} == {"away"}
    site.answers["/away"] = sends(b"", ("Location", "/a.png"), ("Content-Length", "0"), status=307)
    assert fetched(site.url("/away", "images.test"), tmp_path, ["images.test"]).read_bytes() == png()


def test_a_name_that_changes_its_address_between_two_questions_gains_nothing(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, answers = socket.getaddrinfo, iter(["93.184.216.34", "127.0.0.1"])
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: real(next(answers), *rest, **more))
    with pytest.raises(Unfetchable, match=INWARD):
        fetched(site.url("/a.png", "rebind.test"), tmp_path)
    assert next(answers, "both were asked for") == "both were asked for"
    assert site.asked == []


def test_a_proxy_is_not_asked_for_an_inner_address_either(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", site.url(""))
    monkeypatch.setenv("no_proxy", "")
    site.answers["http://nobody-knows.invalid/a.png"] = site.answers["http://10.0.0.7/a.png"] = sends(png())
    assert (
        fetched("http://nobody-knows.invalid/a.png", tmp_path).read_bytes() == png()
    )  # names are the proxy's to look up
    for address in ("169.254.169.254", "[::1]", "10.0.0.7"):
        with pytest.raises(Unfetchable, match=INWARD):
            fetched(f"http://{address}/a.png", tmp_path)
    assert len(site.asked) == 1
    fetched("http://10.0.0.7/a.png", tmp_path, ["10.0.0.7"])


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "240.0.0.1", "::1", "::", "fe80::1%eth0", "fd00:ec2::254", "ff02::1"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "64:ff9b::7f00:1", "64:ff9b:1::1"),
        *("2002:7f00:1::1", "::127.0.0.1", "fec0::1"),
    ],
)
def test_no_address_within_is_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


HEAD = b"HTTP/1.0 200 OK\r\nContent-Length: 100000\r\n\r\n"


@pytest.mark.parametrize("head", [HEAD, HEAD.replace(b"Content-Length: 100000", b"A: b"), HEAD[:30]])
def test_a_server_that_drips_is_left_at_the_deadline(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: bytes
) -> None:
    monkeypatch.setattr(remote, "DEADLINE", 0.5)
    site.answers["/slow"] = drips(head)
    began = time.monotonic()
    with pytest.raises(
        Unavailable, match=r"127\.0\.0\.1, which has images of rows, does not deliver a whole image within"
    ):
        fetched(site.url("/slow?token=hush"), tmp_path, ["127.0.0.1"])
    assert time.monotonic() - began < 15  # the server would go on for 30 s
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("headers", [[], [("Connection", "close")]])
def test_what_is_too_large_is_not_read_to_its_end(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, headers: list[tuple[str, str]]
) -> None:
    monkeypatch.setattr(remote, "LARGEST", 2**20)
    site.answers["/big"] = sends(bytes(9 * 2**20), *headers)
    with pytest.raises(Unfetchable, match="larger than 1 MB"):
        fetched(site.url("/big"), tmp_path, ["127.0.0.1"])
    assert list(tmp_path.iterdir()) == []


def test_only_what_decodes_as_a_picture_is_kept(site: Site, tmp_path: Path) -> None:
    dataset = DatasetSpec(path="x")
    files = Files(None, tmp_path / "images", hosts=("127.0.0.1",))
    site.answers["/b.png"] = sends(b"<html>Please sign in</html>")
    for _ in range(2):
        with pytest.raises(BadRow, match="unknown format"):
            load(site.url("/b.png"), files, dataset)
        load(site.url("/a.png"), files, dataset)
    assert [path.read_bytes() for path in (tmp_path / "images").iterdir()] == [png()]
    site.answers["/b.png"] = sends(png())
    load(site.url("/b.png"), files, dataset)


def test_a_password_in_a_url_is_not_sent(site: Site, tmp_path: Path) -> None:
    with pytest.raises(Unfetchable, match="contains a user or password") as refused:
        fetched(f"http://user:hush@127.0.0.1:{site.port}/a.png", tmp_path, ["127.0.0.1"])
    assert "hush" not in str(refused.value)
    assert site.asked == []
