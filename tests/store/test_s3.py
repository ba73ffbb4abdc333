"""What only an S3 store does: continue, encrypt, renew credentials, and say in a sentence what went wrong."""

from __future__ import annotations

import hashlib
import os
import re
import socketserver
import ssl
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import boto3
import pytest

from job.errors import JobError, NotAllowed, SpecError, Unavailable
from job.store import Conflict, Missing, check_writable, download_files, open_store
from job.store.s3 import S3Store
from tests.s3 import ON_CEPH, SMALL_PART, address
from tests.store.proxy import Message, Proxy, answer

on_moto = pytest.mark.skipif(ON_CEPH, reason="a matter of the proxy and the client alone")
Open = Callable[..., S3Store]


@pytest.fixture
def fresh_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials and configuration are read once a process; these tests want them read again."""
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with Proxy(address(s3)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        yield proxy


def open_small(url: str, **options: str) -> S3Store:
    store = open_store(url, **options)  # type: ignore[arg-type]
    assert isinstance(store, S3Store)
    store.part_size = SMALL_PART
    return store


def requests(proxy: Proxy, word: str) -> list[str]:
    return [line for line in proxy.seen if word in line]


def test_a_broken_download_continues_where_it_stopped(bucket: str, proxy: Proxy, tmp_path: Path) -> None:
    data = os.urandom(8 * SMALL_PART)
    (tmp_path / "up").write_bytes(data)
    store = open_small(f"s3://{bucket}")
    digest = store.upload(tmp_path / "up", "key")
    denied = answer("403 Forbidden", "<Error><Code>AccessDenied</Code></Error>")
    proxy.before = lambda request: denied if f"bytes={6 * SMALL_PART}-".encode() in request.head else None
    with pytest.raises(NotAllowed):
        store.download("key", tmp_path / "down", sha256=digest.sha256)
    assert not (tmp_path / "down").exists()
    proxy.before = None
    proxy.seen.clear()
    assert store.download("key", tmp_path / "down", sha256=digest.sha256) == digest
    assert len(requests(proxy, "GET")) <= 3
    assert (tmp_path / "down").read_bytes() == data


@on_moto
def test_an_upload_that_is_completed_without_an_etag_has_its_version(
    bucket: str, s3: str, proxy: Proxy, tmp_path: Path
) -> None:
    """Ceph 16 answers with an empty one."""

    def completed(request: Message) -> bytes | None:
        method, path, _ = request.first.split(" ")
        if method != "POST" or "uploadId=" not in path:
            return None
        headers = dict(line.split(": ", 1) for line in request.head.decode("latin-1").split("\r\n")[1:] if ": " in line)
        upstream = HTTPConnection(*address(s3))
        upstream.request(method, path, request.body, headers)
        assert upstream.getresponse().read()
        upstream.close()
        return answer("200 OK", "<CompleteMultipartUploadResult><ETag></ETag></CompleteMultipartUploadResult>")

    (tmp_path / "up").write_bytes(os.urandom(2 * SMALL_PART))
    store = open_small(f"s3://{bucket}")
    proxy.before = completed
    assert store.upload(tmp_path / "up", "key").version == store.version("key") != ""
    with pytest.raises(Conflict, match="Another writer"):
        store.upload(tmp_path / "up", "key", if_absent=True)


def test_several_who_fetch_an_object_to_one_path_all_find_it_whole(bucket: str, s3: str, tmp_path: Path) -> None:
    """Rows that name one image are looked at by several threads, and jobs share scratch."""
    body = os.urandom(3 * SMALL_PART)
    store = open_small(f"s3://{bucket}")
    store.write("key", body)

    def fetch(_: int) -> bytes:
        open_small(f"s3://{bucket}").download("key", tmp_path / "down")
        return (tmp_path / "down").read_bytes()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(fetch, range(8))) == [body] * 8
    assert [file.name for file in tmp_path.iterdir()] == ["down"]


def test_a_partial_file_that_is_not_a_true_beginning_is_fetched_anew(bucket: str, s3: str, tmp_path: Path) -> None:
    (tmp_path / "up").write_bytes(os.urandom(3 * SMALL_PART))
    store = open_small(f"s3://{bucket}")
    digest = store.upload(tmp_path / "up", "key")
    mark = hashlib.sha256(store.version("key").encode()).hexdigest()[:12]
    for size in (SMALL_PART, 9 * SMALL_PART):
        (tmp_path / f".down.{mark}.part").write_bytes(b"?" * size)
        assert store.download("key", tmp_path / "down", sha256=digest.sha256) == digest


@pytest.mark.parametrize("header", [b"etag: ", b"content-length: "])
def test_a_head_that_was_cut_in_the_middle_of_a_value_is_not_believed(
    bucket: str, proxy: Proxy, tmp_path: Path, header: bytes
) -> None:
    (tmp_path / "up").write_bytes(os.urandom(12345))
    store = open_small(f"s3://{bucket}")
    digest = store.upload(tmp_path / "up", "key")
    proxy.fault, proxy.cut, proxy.at = "beheaded", header, len(proxy.seen) + 1
    assert store.download("key", tmp_path / "down", sha256=digest.sha256) == digest
    assert "HEAD" in proxy.seen[proxy.at - 1]


def test_a_listing_whose_body_was_lost_is_not_an_empty_one(bucket: str, proxy: Proxy) -> None:
    """Else a job would find no checkpoint and begin from nothing."""
    store = open_small(f"s3://{bucket}")
    store.write("key", b"1")
    empty = answer("200 OK", "")
    first = len(proxy.seen)
    proxy.before = lambda request: empty if len(proxy.seen) <= first + 2 else None
    assert [entry.key for entry in store.list()] == ["key"]


def test_an_object_that_changes_under_a_download_is_noticed(bucket: str, s3: str, proxy: Proxy, tmp_path: Path) -> None:
    (tmp_path / "up").write_bytes(os.urandom(3 * SMALL_PART))
    store = open_small(f"s3://{bucket}")
    store.upload(tmp_path / "up", "key")
    other = boto3.client("s3", endpoint_url=s3)

    def change(request: Message) -> bytes | None:
        if request.first.startswith("GET"):
            proxy.before = None
            other.put_object(Bucket=bucket, Key="key", Body=b"other")
        return None

    proxy.before = change
    with pytest.raises(JobError):
        store.download("key", tmp_path / "down")
    assert not (tmp_path / "down").exists()


def test_uploads_that_died_are_given_up(bucket: str, s3: str) -> None:
    store = open_small(f"s3://{bucket}/out")
    mine = store.client.create_multipart_upload(Bucket=bucket, Key="out/checkpoints/x")
    other = store.client.create_multipart_upload(Bucket=bucket, Key="elsewhere/x")
    beside = store.client.create_multipart_upload(Bucket=bucket, Key="out/somebody/x")
    if ON_CEPH:  # moto says of each that it began in 2010
        assert store.abort_stale({"checkpoints/x"}, 3600) == 0
    assert store.abort_stale({"checkpoints/x", "x"}, -5) == 1
    left = store.client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert {upload["UploadId"] for upload in left} == {other["UploadId"], beside["UploadId"]}
    assert mine["UploadId"] not in {upload["UploadId"] for upload in left}


def test_a_failed_upload_leaves_no_parts_to_pay_for(bucket: str, proxy: Proxy, tmp_path: Path) -> None:
    (tmp_path / "up").write_bytes(os.urandom(3 * SMALL_PART))
    store = open_small(f"s3://{bucket}")
    denied = answer("403 Forbidden", "<Error><Code>AccessDenied</Code></Error>")
    proxy.before = lambda request: denied if "partNumber=2" in request.first else None
    with pytest.raises(NotAllowed, match=f"s3:PutObject on s3://{bucket}/key"):
        store.upload(tmp_path / "up", "key")
    assert store.client.list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []


def test_keys_that_lead_out_of_the_folder_are_refused_on_the_way_down(bucket: str, s3: str, tmp_path: Path) -> None:
    store = open_small(f"s3://{bucket}/data")
    store.client.put_object(Bucket=bucket, Key="data/../../escaped", Body=b"x")
    with pytest.raises(JobError, match="outside"):
        list(download_files(store, [entry.key for entry in store.list()], tmp_path / "in"))
    assert not (tmp_path.parent / "escaped").exists()


SENTENCES = [
    ("403 Forbidden", "AccessDenied", 77, "do not allow s3:PutObject on s3://"),
    ("403 Forbidden", "InvalidAccessKeyId", 77, "does not accept these credentials"),
    ("403 Forbidden", "SignatureDoesNotMatch", 77, "does not accept these credentials"),
    ("403 Forbidden", "RequestTimeTooSkewed", 77, "clock"),
    ("400 Bad Request", "ExpiredToken", 77, "expired"),
    ("400 Bad Request", "KMS.DisabledException", 77, "encryption key"),
    ("404 Not Found", "NoSuchBucket", 78, "no bucket s3://"),
    ("301 Moved", "PermanentRedirect", 78, "eu-west-3"),
]


@on_moto
@pytest.mark.parametrize(("status", "code", "exit_code", "says"), SENTENCES)
def test_refusals_are_sentences_and_are_not_tried_again(
    bucket: str, proxy: Proxy, status: str, code: str, exit_code: int, says: str
) -> None:
    body = f"<Error><Code>{code}</Code><Message>m</Message></Error>"
    store = open_small(f"s3://{bucket}/out")
    store.capabilities  # noqa: B018 asked before the trouble begins
    proxy.before = lambda request: answer(status, body, "x-amz-bucket-region: eu-west-3")
    proxy.seen.clear()
    with pytest.raises(JobError, match=says) as refused:
        store.write("key", b"x")
    assert refused.value.exit_code == exit_code
    assert len(requests(proxy, "PUT")) <= (2 if status.startswith("301") else 1)


@on_moto
def test_a_store_that_asks_for_patience_too_often_is_unavailable(
    bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.store.connection.ATTEMPTS", 2)
    store = open_small(f"s3://{bucket}/out")
    proxy.before = lambda request: answer("429 Too Many Requests", "<Error><Code>429</Code></Error>")
    with pytest.raises(Unavailable, match="429"):
        store.read("key")
    assert len(proxy.seen) == 2


def test_a_bucket_that_is_not_there_is_a_wrong_spec(s3: str) -> None:
    with pytest.raises(SpecError, match="no bucket s3://no-such-bucket-here"):
        check_writable(open_store("s3://no-such-bucket-here/x"))


@on_moto
def test_an_endpoint_where_nobody_listens_is_unavailable(
    s3: str, monkeypatch: pytest.MonkeyPatch, fresh_session: None
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setattr("job.store.connection.ATTEMPTS", 2)
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9"):
        open_store("s3://bucket").read("x")


@on_moto
def test_no_credentials_at_all_is_not_allowed(s3: str, monkeypatch: pytest.MonkeyPatch, fresh_session: None) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(NotAllowed, match="No credentials"):
        open_store("s3://bucket").read("x")


@on_moto
def test_a_web_identity_that_expires_in_the_middle_of_an_upload_is_renewed_from_the_new_token(
    bucket: str, s3: str, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_session: None
) -> None:
    """As on Kubernetes: a role, a token that is changed now and then, an STS that gives credentials for a while."""
    (tmp_path / "up").write_bytes(os.urandom(6 * SMALL_PART))
    (tmp_path / "token").write_text("first")
    asked: list[str] = []

    def issue(request: Message) -> bytes:
        """moto's own answer, whose credentials live for half a second."""
        asked.append(parse_qs(request.body.decode())["WebIdentityToken"][0])
        (tmp_path / "token").write_text("second")
        with urllib.request.urlopen(s3, request.body) as issued:
            end = datetime.now(UTC) + timedelta(seconds=0.5)
            return answer(
                "200 OK", re.sub("<Expiration>[^<]*", f"<Expiration>{end.isoformat()}", issued.read().decode())
            )

    with Proxy(address(s3), before=issue) as sts:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/trainer")
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.url)
        store = open_small(f"s3://{bucket}")
        proxy.delay = 0.2
        digest = store.upload(tmp_path / "up", "key")
        proxy.delay = 0
        assert store.download("key", tmp_path / "down", sha256=digest.sha256) == digest
    heads = [head for head in proxy.heads if b"partNumber" in head]
    assert all(b"x-amz-security-token" in head.lower() for head in heads)
    assert len({head.split(b"Credential=")[1].split(b"/")[0] for head in heads}) > 1
    assert (asked[0], set(asked[1:])) == ("first", {"second"})


@on_moto
@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("AWS_PROFILE", "nobody", 78),
        ("AWS_ENDPOINT_URL_S3", "localhost:9000", 78),
        ("AWS_DEFAULT_REGION", "mars 1", 78),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/nowhere/token", 77),
        ("AWS_CA_BUNDLE", "/nowhere/authorities.pem", 78),
    ],
)
def test_settings_of_the_platform_that_cannot_be_used_are_named(
    s3: str, name: str, value: str, code: int, monkeypatch: pytest.MonkeyPatch, fresh_session: None
) -> None:
    if code == 77:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/trainer")
    monkeypatch.setenv(name, value)
    if name == "AWS_CA_BUNDLE":
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.replace("http://", "https://"))
    with pytest.raises(JobError, match=name) as refused:
        open_store("s3://bucket").read("x")
    assert refused.value.exit_code == code


@on_moto
def test_an_endpoint_without_tls_is_named(s3: str, monkeypatch: pytest.MonkeyPatch, fresh_session: None) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.replace("http:", "https:"))
    monkeypatch.setattr("job.store.connection.ATTEMPTS", 2)
    with pytest.raises(SpecError, match="http://"):
        open_store("s3://bucket").read("x")


@on_moto
def test_an_authority_is_trusted_where_the_platform_names_it_and_only_there(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    name = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        *name,
        "-keyout",
        key,
        "-out",
        cert,
    ]
    subprocess.run(make, check=True, capture_output=True)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.wfile.write(answer("200 OK", "x", f'ETag: "{hashlib.md5(b"x").hexdigest()}"'))

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"https://127.0.0.1:{server.server_port}")
        monkeypatch.setattr("job.store.connection.ATTEMPTS", 2)
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
        with pytest.raises(SpecError, match="AWS_CA_BUNDLE"):
            open_store("s3://bucket").read("x")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(cert))
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
        assert open_store("s3://bucket").read("x") == b"x"
        server.shutdown()


@on_moto
def test_a_tls_that_breaks_off_is_no_wrong_spec(s3: str, monkeypatch: pytest.MonkeyPatch, fresh_session: None) -> None:
    """As behind a load balancer that has nobody to send us to at the moment."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(100)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"https://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setattr("job.store.connection.ATTEMPTS", 2)
        with pytest.raises(Unavailable, match="s3:GetObject on s3://bucket/x failed after retries"):
            open_store("s3://bucket").read("x")
        server.shutdown()


@on_moto
def test_a_role_that_may_not_be_assumed_is_not_allowed(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_session: None
) -> None:
    denied = answer("403 Forbidden", "<ErrorResponse><Error><Code>AccessDenied</Code></Error></ErrorResponse>")
    (tmp_path / "token").write_text("stranger")
    with Proxy(address(s3), before=lambda request: denied) as sts:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/trainer")
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.url)
        with pytest.raises(NotAllowed, match="AssumeRoleWithWebIdentity"):
            open_store("s3://bucket").read("x")


@on_moto
def test_virtual_host_addresses_are_used_when_the_configuration_says_so(
    bucket: str, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_session: None
) -> None:
    (tmp_path / "config").write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3.example.test")
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    proxy.before = lambda request: answer("200 OK", "", 'ETag: "1"', "Date: Sun, 22 Nov 2026 00:00:00 GMT")
    assert open_store(f"s3://{bucket}").read("some key") == b""
    assert f"http://{bucket}.s3.example.test/some%20key" in proxy.seen[0]


@on_moto
def test_a_store_that_forgets_the_encryption_is_refused_and_the_object_removed(bucket: str, proxy: Proxy) -> None:
    store = open_small(f"s3://{bucket}", sse="AES256")
    proxy.before = lambda request: answer("200 OK", "", 'ETag: "1"') if request.first.startswith("PUT") else None
    store._probed = None
    with pytest.raises(SpecError, match="not with AES256"):
        store.put("key", b"x", {}, checksums=True)
    assert requests(proxy, "DELETE")


def test_encryption_that_a_store_does_not_offer_is_a_sentence(bucket: str, request: pytest.FixtureRequest) -> None:
    """Ceph 20 answers 400 to AES256, Ceph 16 ignores it. moto gives it, so there the proxy refuses."""
    if not ON_CEPH:
        refused = answer("400 Bad Request", "<Error><Code>InvalidArgument</Code></Error>")
        request.getfixturevalue("proxy").before = lambda sent: refused if b"AES256" in sent.head else None
    with pytest.raises(SpecError, match="encryption.*AES256.*asks"):
        check_writable(open_small(f"s3://{bucket}", sse="AES256"))
    assert list(open_small(f"s3://{bucket}").list()) == []


def test_encryption_with_a_key_is_asked_for_and_seen(bucket: str, s3: str, tmp_path: Path) -> None:
    store = open_small(f"s3://{bucket}", sse="aws:kms", sse_kms_key_id="testkey")
    (tmp_path / "up").write_bytes(os.urandom(2 * SMALL_PART))
    store.write("small", b"x")
    store.upload(tmp_path / "up", "large")
    for key in ("small", "large"):
        head = store.client.head_object(Bucket=bucket, Key=key)
        assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "testkey")
    assert store.read("small") == b"x"


@on_moto
def test_a_store_without_conditional_writes_is_found_out_and_served(
    bucket: str, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    def forgetful(request: Message) -> None:
        lines = request.head.split(b"\r\n")
        request.head = b"\r\n".join(
            line for line in lines if not line.lower().startswith((b"if-none-match", b"if-match"))
        )

    proxy.before = forgetful  # type: ignore[assignment]
    store = open_small(f"s3://{bucket}")
    assert not check_writable(store).conditional
    assert [message for message in caplog.messages if "no conditional writes" in message]
    version = store.write("key", b"1", if_absent=True)
    with pytest.raises(JobError):
        store.write("key", b"2", if_absent=True)
    store.write("key", b"2", if_match=version)
    assert store.read("key") == b"2"


@on_moto
def test_a_store_that_takes_an_etag_only_without_its_quotes_still_has_one_writer(bucket: str, proxy: Proxy) -> None:
    """As Ceph 16 does."""
    failed = answer("412 Precondition Failed", "<Error><Code>PreconditionFailed</Code></Error>")
    proxy.before = lambda request: failed if b'if-match: "' in request.head.lower() else None
    store = open_small(f"s3://{bucket}")
    assert check_writable(store).conditional
    old = store.write("key", b"1", if_absent=True)
    store.write("key", b"2", if_match=old)
    with pytest.raises(Conflict):
        store.write("key", b"3", if_match=old)
    assert store.read("key") == b"2"


@on_moto
def test_a_store_that_rejects_the_newer_checksums_is_served_with_md5(bucket: str, proxy: Proxy, tmp_path: Path) -> None:
    old = answer("400 Bad Request", "<Error><Code>InvalidArgument</Code></Error>")
    proxy.before = lambda request: old if b"x-amz-checksum" in request.head.lower() else None
    store = open_small(f"s3://{bucket}")
    (tmp_path / "up").write_bytes(os.urandom(2 * SMALL_PART))
    assert not check_writable(store).checksums
    digest = store.upload(tmp_path / "up", "key")
    assert store.download("key", tmp_path / "down", sha256=digest.sha256) == digest
    assert any(b"content-md5" in head.lower() for head in proxy.heads)


def test_what_is_missing_is_missing(bucket: str, s3: str) -> None:
    with pytest.raises(Missing):
        open_store(f"s3://{bucket}").read("x")
