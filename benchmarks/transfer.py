"""A large file to an S3 store and back, beside what a user would do otherwise and beside the floor.

    python benchmarks/transfer.py --gib 2 --rounds 3

The store is the one in AWS_ENDPOINT_URL_S3 (`sh tests/store/ceph.sh python benchmarks/transfer.py` brings up a Ceph).
Each contestant runs in a process of its own, one after the other in each round, which begins with another. A ratio is the
median over the rounds of times taken in the same round. The floor is http.client with presigned urls, sendfile up and
recv_into down over as many connections as we use: no hashing; `floor+sha` reads and hashes the file once beside it.
Contestants that are not installed (aws, awscrt) are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import json
import mmap
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import append

PART = 16 * 2**20
CONNECTIONS = 4
NAMES = ("floor", "floor+sha", "ours", "boto3", "crt", "aws")


def ours(way: str, bucket: str, key: str, path: Path) -> None:
    from job.store import open_store

    store = open_store(f"s3://{bucket}")
    if way == "up":
        digest = store.upload(path, key)
        path.with_suffix(".sha256").write_text(digest.sha256)
    else:
        store.download(key, path, sha256=path.with_name("source.sha256").read_text())


def boto3_defaults(way: str, bucket: str, key: str, path: Path) -> None:
    client = boto3.client("s3")
    if way == "up":
        client.upload_file(str(path), bucket, key)
    else:
        client.download_file(bucket, key, str(path))


def crt(way: str, bucket: str, key: str, path: Path) -> None:
    import botocore.session
    from s3transfer.crt import (
        BotocoreCRTCredentialsWrapper,
        BotocoreCRTRequestSerializer,
        CRTTransferManager,
        create_s3_crt_client,
    )

    session = botocore.session.Session()
    endpoint = os.environ["AWS_ENDPOINT_URL_S3"]
    region = os.environ["AWS_DEFAULT_REGION"]
    credentials = BotocoreCRTCredentialsWrapper(session.get_credentials()).to_crt_credentials_provider()
    client = create_s3_crt_client(
        region, credentials, use_ssl=endpoint.startswith("https"), verify=os.environ.get("AWS_CA_BUNDLE")
    )
    options = {"endpoint_url": endpoint, "region_name": region}
    with CRTTransferManager(client, BotocoreCRTRequestSerializer(session, options)) as manager:
        if way == "up":
            manager.upload(str(path), bucket, key).result()
        else:
            manager.download(bucket, key, str(path)).result()


def aws(way: str, bucket: str, key: str, path: Path) -> None:
    there = f"s3://{bucket}/{key}"
    source, target = (str(path), there) if way == "up" else (there, str(path))
    program = os.environ.get("AWS_PROGRAM", "aws")
    subprocess.run([program, "s3", "cp", "--only-show-errors", source, target], check=True)


def floor(way: str, bucket: str, key: str, path: Path, *, sha: bool) -> None:
    client = boto3.client("s3")
    hashing = threading.Thread(target=hash_file, args=(path,))
    if way == "up":
        if sha:
            hashing.start()
        floor_up(client, bucket, key, path)
        if sha:
            hashing.join()
    else:
        size = client.head_object(Bucket=bucket, Key=key)["ContentLength"]
        floor_down(client, bucket, key, path, size, hashlib.sha256() if sha else None)


def hash_file(path: Path) -> None:
    with path.open("rb") as stream:
        hashlib.file_digest(stream, "sha256")


def floor_up(client: Any, bucket: str, key: str, path: Path) -> None:
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    size = path.stat().st_size
    local = threading.local()

    def send(number: int) -> dict[str, Any]:
        where = {"Bucket": bucket, "Key": key, "UploadId": upload, "PartNumber": number + 1}
        url = urlsplit(client.generate_presigned_url("upload_part", where))
        length = min(PART, size - number * PART)
        line = connection(local, url)
        line.putrequest("PUT", f"{url.path}?{url.query}")
        line.putheader("Content-Length", str(length))
        line.endheaders()
        with path.open("rb") as stream:
            line.sock.sendfile(stream, number * PART, length)
        answer = line.getresponse()
        answer.read()
        return {"PartNumber": number + 1, "ETag": answer.headers["ETag"]}

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        parts = list(pool.map(send, range(-(-size // PART))))
    client.complete_multipart_upload(Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts})


def floor_down(client: Any, bucket: str, key: str, path: Path, size: int, digest: Any) -> None:
    local = threading.local()
    url = urlsplit(client.generate_presigned_url("get_object", {"Bucket": bucket, "Key": key}))
    with path.open("w+b") as stream:
        stream.truncate(size)
        with mmap.mmap(stream.fileno(), size) as whole:

            def fetch(number: int) -> None:
                start, end = number * PART, min(size, (number + 1) * PART)
                line = connection(local, url)
                line.request("GET", f"{url.path}?{url.query}", headers={"Range": f"bytes={start}-{end - 1}"})
                answer = line.getresponse()
                while start < end:
                    with memoryview(whole)[start:end] as view:
                        start += answer.readinto(view)
                answer.read()

            with ThreadPoolExecutor(CONNECTIONS) as pool:
                for number, done in enumerate([pool.submit(fetch, n) for n in range(-(-size // PART))]):
                    done.result()
                    if digest is not None:
                        with memoryview(whole)[number * PART : (number + 1) * PART] as view:
                            digest.update(view)


def connection(local: threading.local, url: Any) -> http.client.HTTPConnection:
    if not hasattr(local, "line"):
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        local.line = kind(url.hostname, url.port)
    line: http.client.HTTPConnection = local.line
    if line.sock is None:
        line.connect()
    return line


def run(name: str, way: str, bucket: str, key: str, path: Path) -> None:
    """One contestant, in this process. Prints seconds, peak memory in MB and seconds of processor."""
    calls: dict[str, Any] = {"ours": ours, "boto3": boto3_defaults, "crt": crt, "aws": aws}
    began = time.perf_counter()
    if name.startswith("floor"):
        floor(way, bucket, key, path, sha=name.endswith("sha"))
    else:
        calls[name](way, bucket, key, path)
    seconds = time.perf_counter() - began
    who = resource.RUSAGE_CHILDREN if name == "aws" else resource.RUSAGE_SELF
    used = resource.getrusage(who)
    print(json.dumps([seconds, used.ru_maxrss / 1000, used.ru_utime + used.ru_stime]))


def measure(name: str, way: str, bucket: str, key: str, path: Path) -> tuple[float, float, float]:
    command = [sys.executable, __file__, "--run", name, way, bucket, key, str(path)]
    seconds, memory, busy = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]
    )
    return seconds, memory, busy


def installed(name: str) -> bool:
    if name == "aws":
        return shutil.which(os.environ.get("AWS_PROGRAM", "aws")) is not None
    with contextlib.suppress(ImportError):
        __import__("awscrt.s3" if name == "crt" else "boto3")
        return True
    return False


def main(gib: float, rounds: int, folder: Path) -> None:
    client = boto3.client("s3")
    bucket = f"bench-{os.getpid()}"
    client.create_bucket(Bucket=bucket)
    source, target = folder / "source", folder / "target"
    with source.open("wb") as stream:
        for _ in range(int(gib * 64)):
            stream.write(os.urandom(PART))
    names = [name for name in NAMES if installed(name)]
    seconds: dict[tuple[str, str], list[float]] = {(way, name): [] for way in ("up", "down") for name in names}
    processor: dict[tuple[str, str], list[float]] = {case: [] for case in seconds}
    memory = dict.fromkeys(("up", "down"), 0.0)
    for turn in range(rounds):
        for way in ("up", "down"):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:  # none always follows the same one
                key = name if way == "up" else "ours"
                took, used, busy = measure(name, way, bucket, key, source if way == "up" else target)
                seconds[way, name].append(took)
                processor[way, name].append(busy)
                if name == "ours":
                    memory[way] = max(memory[way], used)
                if way == "up" and name != "ours":
                    client.delete_object(Bucket=bucket, Key=key)
                target.unlink(missing_ok=True)
                print(f"{way:5s}{name:10s}{gib * 1024 / took:8.0f} MiB/s{used:8.0f} MB{busy:8.1f} s busy", flush=True)
                time.sleep(3)  # let the store clean up what was deleted
    client.delete_object(Bucket=bucket, Key="ours")
    report(gib, seconds, processor, memory)


Times = dict[tuple[str, str], list[float]]


def report(gib: float, seconds: Times, processor: Times, memory: dict[str, float]) -> None:
    what = f"{os.environ.get('TEST_S3_VERSION', '')} {gib:g} GiB".replace("ceph version", "Ceph").strip()
    for way in ("up", "down"):
        for name in (name for direction, name in seconds if direction == way):
            append("transfer", f"{what} {way}, {name}", gib * 1024 / statistics.median(seconds[way, name]), "MiB/s")

        def ratio(slow: str, fast: str, times: Times = seconds, way: str = way) -> float:
            return statistics.median(a / b for a, b in zip(times[way, slow], times[way, fast], strict=True))

        times = ratio("boto3", "ours")
        append("transfer", f"{what} {way}, ours over boto3", times, "×", goal="at least 1.4", meets=times >= 1.4)
        for fast in ("floor", "floor+sha"):  # what a client that does nothing else could be
            append("transfer", f"{what} {way}, {fast} over boto3", ratio("boto3", fast), "×")
        busy = ratio("ours", "boto3", processor)
        append("transfer", f"{what} {way}, processor time of ours over that of boto3", busy, "×")
        behind = ratio("ours", "floor+sha")
        append(
            "transfer",
            f"{what} {way}, time over floor with one SHA-256",
            behind,
            "×",
            goal="at most 1.25",
            meets=behind <= 1.25,
        )
        append("transfer", f"{what} {way}, peak memory", memory[way], "MB", goal="under 300", meets=memory[way] < 300)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        name, way, bucket, key, path = sys.argv[2:7]
        run(name, way, bucket, key, Path(path))
    else:
        arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        arguments.add_argument("--gib", type=float, default=2)
        arguments.add_argument("--rounds", type=int, default=3)
        arguments.add_argument(
            "--folder", type=Path, help="where the file lies; a memory file system leaves the disk out"
        )
        given = arguments.parse_args()
        with tempfile.TemporaryDirectory(dir=given.folder) as work:
            main(given.gib, given.rounds, Path(work))
