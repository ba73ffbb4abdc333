"""For every request of a job's life with its store, each of the things that can happen to it."""

from __future__ import annotations

import copy
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from job.checkpoint import commit, prune, read_manifest, restore, steps
from job.errors import JobError
from job.store import Store, check_writable, open_store
from job.store.lease import acquire
from tests.s3 import SMALL_PART, address
from tests.store.proxy import FAULTS, Proxy

ENVIRONMENT = threading.Lock()
FROZEN = os.urandom(SMALL_PART + 100)
ENDINGS = {"": {0}, "expired": {77}, "flipped": {0, 65, 69, 78}}  # flipped XML may say anything


def live(store: Store, work: Path) -> list[int]:
    """A short life: two checkpoints, the second sharing a file with the first, and a resume. Returns the commits."""
    committed = []
    folder = work / "trainer"
    folder.mkdir()
    (folder / "frozen.bin_").write_bytes(FROZEN)
    check_writable(store)
    with acquire(store, "a test", 600) as lease:
        for step in (10, 20):
            (folder / "state").write_bytes(b"state of %d" % step)
            commit(store, folder, step=step, epoch=step / 10, spec_digest="d", attempt=1, lease=lease)
            committed.append(step)
        prune(store, keep=1, verified=20)
        restored = restore(store, work / "restored", on_skip=lambda step, reason: None)
        assert restored is not None
        assert (restored.folder / "frozen.bin_").read_bytes() == FROZEN
        assert (restored.folder / "state").read_bytes() == b"state of %d" % restored.manifest.step
    return committed


def open_behind(proxy: Proxy, url: str) -> Store:
    """The endpoint comes from the environment only, which all threads share."""
    with ENVIRONMENT, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        return open_store(url)


def one_day(server: str, bucket: str, honest: Store, fault: str, at: int) -> tuple[int, int]:
    """Live behind the proxy, then look at the store without it. Returns the exit code and the requests made."""
    honest = copy.copy(honest)  # one client for all days: making one takes longer than living one
    honest.prefix = f"{fault}-{at}/out/"  # type: ignore[attr-defined]
    with Proxy(address(server), fault=fault, at=at) as proxy, tempfile.TemporaryDirectory() as work:
        store = open_behind(proxy, f"s3://{bucket}/{fault}-{at}/out")
        store.part_size = SMALL_PART  # type: ignore[attr-defined]
        code = 0
        committed: list[int] = []
        try:
            committed = live(store, Path(work))
        except JobError as error:
            code = error.exit_code
        # Every checkpoint that the store now claims to hold is whole; a life to its end has seen that itself.
        for number, step in enumerate(steps(honest) if code else []):
            manifest = read_manifest(honest, step)
            for name, file in manifest.files.items():
                honest.download(file.key, Path(work) / f"check-{number}" / name, sha256=file.sha256)
        assert not committed or 20 in steps(honest)
        return code, len(proxy.seen)


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_befalls_a_request_only_whole_checkpoints_are_left(s3: str, bucket: str, fault: str) -> None:
    address(s3)  # or leave out the test
    day = partial(one_day, s3, bucket, open_store(f"s3://{bucket}"))
    code, requests = day("", 0)
    assert (code, requests > 15) == (0, True)
    # What is waited for is waited for together; the others would only be in each other's way.
    with ThreadPoolExecutor(requests if fault in ("stall", "503") else 4) as pool:
        codes = {at: code for at, (code, _) in enumerate(pool.map(partial(day, fault), range(1, requests)), 1)}
    allowed = ENDINGS.get(fault, {0})
    assert {at: code for at, code in codes.items() if code not in allowed} == {}
