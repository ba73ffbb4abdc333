"""An S3 server for tests: moto's over real sockets, or the one that the environment names (`make test-store`)."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import pytest

from job.store import Store, open_store

ON_CEPH = os.environ.get("TEST_S3_SERVER") == "ceph"
# S3 takes no part under 5 MiB but the last; moto can be told otherwise.
SMALL_PART = 5 * 2**20 if ON_CEPH else 64 * 2**10

# As they were when the suite began: a test may run with none of them in its environment.
GIVEN = {name: value for name, value in os.environ.items() if name.startswith("AWS_")} if ON_CEPH else {}
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tester",
    "AWS_SECRET_ACCESS_KEY": "testersecret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextlib.contextmanager
def moto(*prefix: str) -> Iterator[str]:
    """Run moto's server, behind the words of `prefix`, unless `make test-store` gave another. Yields the url."""
    if "AWS_ENDPOINT_URL_S3" in GIVEN:
        yield GIVEN["AWS_ENDPOINT_URL_S3"]
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [*prefix, sys.executable, "-P", str(Path(__file__).parent / "moto_server.py"), str(port)],
        env={**os.environ, "S3_UPLOAD_PART_MIN_SIZE": "1024", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "moto did not start"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The url of a running server. Tests take `s3`, which also says so to the environment."""
    with moto() as url:
        yield url


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The platform's variables, as a job would find them. The value is the url of the server."""
    point_at(s3_server, monkeypatch)
    return s3_server


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**CREDENTIALS, **GIVEN, "AWS_ENDPOINT_URL_S3": url}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


@pytest.fixture
def new_bucket(s3: str) -> Callable[[], str]:
    """Makes an empty bucket of its own at each call and returns its name."""
    return make_bucket


@pytest.fixture
def bucket(s3: str) -> str:
    """An empty bucket for one test."""
    return make_bucket()


def make_bucket() -> str:
    name = f"test-{secrets.token_hex(8)}"
    client = boto3.client("s3")
    client.create_bucket(Bucket=name)
    client.close()
    return name


def address(url: str) -> tuple[str, int]:
    """Where the proxy finds the server. A test with it is left out where the server speaks https, which it does not."""
    if url.startswith("https:"):
        pytest.skip("the proxy speaks http")
    parts = urlsplit(url)
    return str(parts.hostname), int(parts.port or 80)


@pytest.fixture(params=["s3", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Each door in turn. The prefix holds what prefixes may hold."""
    if request.param == "s3":
        store = open_store(f"s3://{request.getfixturevalue('bucket')}/a prefix/ü")
        store.part_size = SMALL_PART  # type: ignore[attr-defined]
        return store
    return open_store(f"file://{tmp_path}/a%20store")
