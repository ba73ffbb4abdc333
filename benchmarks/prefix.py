"""An s3:// prefix of many objects, fetched from the store of the tests: `python -m benchmarks.prefix [OBJECTS]`.

Prints seconds and peak memory of the process that fetches a tenth of the objects, all of them, all again where nothing has
changed, and all again where one has.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3

from tests.s3 import CREDENTIALS, moto

FETCH = """
import resource, sys, time
from pathlib import Path
from job.runtime.staging import local_path
began = time.monotonic()
folder = local_path(sys.argv[1], Path(sys.argv[2]), "dataset.path")
seconds, memory = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
print(f"{sum(1 for _ in folder.rglob('*.txt')):>7} files  {seconds:7.1f} s  {memory} MB", flush=True)
"""


def main(count: int) -> None:
    with moto() as url, tempfile.TemporaryDirectory() as scratch:
        os.environ |= CREDENTIALS | {"AWS_ENDPOINT_URL_S3": url, "AWS_EC2_METADATA_DISABLED": "true"}
        client = boto3.client("s3")
        client.create_bucket(Bucket="many")

        def put(number: int, text: str = "a film") -> None:
            prefix = "few" if number < count // 10 else "more"
            client.put_object(Bucket="many", Key=f"{prefix}/p{number % 97}/{number:07}.txt", Body=text.encode())

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, range(count)))
        for what, prefix in (("a tenth", "/few"), ("all", ""), ("unchanged", ""), ("one changed", "")):
            if what == "one changed":
                put(0, "another film")
            print(f"{what:<12}", end="", flush=True)
            subprocess.run([sys.executable, "-c", FETCH, f"s3://many{prefix}", str(Path(scratch) / "s")], check=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
