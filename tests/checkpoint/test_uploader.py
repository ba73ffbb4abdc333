"""Off the training thread, newest wins, failures never reach training."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from job.checkpoint import Manifest, Uploader, read_manifest, steps
from job.errors import JobError, Preempted, Unavailable
from job.runtime.preemption import Preemption
from job.store import Store, open_store
from job.store.lease import acquire
from job.train.stage import MOST_FAILURES, wait_for_uploads
from tests.s3 import address
from tests.store.proxy import Proxy, answer


def snapshot(work: Path, step: int, size: int = 10) -> Path:
    folder = work / f"snapshot-{step}"
    folder.mkdir(parents=True)
    (folder / "state").write_bytes(step.to_bytes(4, "big") * size)
    return folder


def uploader(store: Store, **options: object) -> Uploader:
    defaults: dict[str, object] = {"spec_digest": "d", "attempt": 0, "lease": None, "keep": 9, "first_pause": 0.05}
    return Uploader(store, **{**defaults, **options})  # type: ignore[arg-type]


def test_snapshots_are_committed_and_removed(store: Store, tmp_path: Path) -> None:
    seen: list[Manifest] = []
    with uploader(store, on_commit=seen.append) as up:
        folder = snapshot(tmp_path, 1)
        up.submit(folder, 1, epoch=0.5, extra={"a": 1})
        assert up.wait(30)
    assert steps(store) == [1]
    assert not folder.exists()
    assert [(manifest.step, manifest.epoch, manifest.extra) for manifest in seen] == [(1, 0.5, {"a": 1})]


def test_a_snapshot_may_still_be_in_the_making(tmp_path: Path) -> None:
    store, written = open_store(str(tmp_path / "store")), Future[None]()
    with uploader(store) as up:
        up.submit(tmp_path / "snapshot-1", 1, epoch=0, written=written)
        assert not up.wait(0.1)
        snapshot(tmp_path, 1)
        written.set_result(None)
        assert up.wait(30)
    assert store.read(read_manifest(store, 1).files["state"].key) == (1).to_bytes(4, "big") * 10


def test_a_snapshot_that_could_not_be_written_is_a_failure_like_another(tmp_path: Path) -> None:
    store, written = open_store(str(tmp_path / "store")), Future[None]()
    written.set_exception(Unavailable("The disk is full."))
    failures: list[tuple[int, JobError, int]] = []
    with uploader(store, on_failure=lambda *failure: failures.append(failure)) as up:
        up.submit(snapshot(tmp_path, 1), 1, epoch=0, written=written)
        assert not up.wait(0.1)
        up.submit(snapshot(tmp_path, 2), 2, epoch=0)
        assert up.wait(30)
    assert (failures[0][0], failures[0][1].exit_code, str(failures[0][1])) == (1, 69, "The disk is full.")
    assert steps(store) == [2]


def test_a_callback_that_fails_does_not_end_the_uploads(tmp_path: Path) -> None:
    """Else the end of training would wait for ever for a thread that is gone."""

    def fail(manifest: Manifest) -> None:
        raise FileNotFoundError("a compiled file that was there a moment ago")

    store = open_store(str(tmp_path / "store"))
    with uploader(store, on_commit=fail) as up:
        for step in (1, 2):
            up.submit(snapshot(tmp_path, step), step, epoch=0)
            assert up.wait(30)
    assert steps(store) == [2, 1]


def test_old_checkpoints_are_pruned(store: Store, tmp_path: Path) -> None:
    with uploader(store, keep=2) as up:
        for step in range(1, 8):
            up.submit(snapshot(tmp_path, step), step, epoch=0)
            assert up.wait(30)
    assert steps(store) == [7, 6]


def test_submit_waits_for_nothing_and_the_newest_wins(
    s3: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    with Proxy(address(s3), before=lambda request: None if answers.wait(60) else b"") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        store = open_store(f"s3://{bucket}/out")
        with uploader(store) as up:
            up.submit(snapshot(tmp_path, 1), 1, epoch=0)
            while not proxy.seen:
                assert not up.wait(0.01)
            for step in range(2, 6):
                up.submit(snapshot(tmp_path, step), step, epoch=0)
            answers.set()
            assert up.wait(60)
            assert steps(store) == [5, 1]
    while list(tmp_path.glob("snapshot-*")):  # threads of their own remove what was passed over
        time.sleep(0.01)


def test_failures_are_reported_loudly_at_last_and_the_copy_is_kept(
    s3: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusing = threading.Event()
    refusing.set()
    refusal = answer("403 Forbidden", "<Error><Code>AccessDenied</Code></Error>")
    failures: list[tuple[int, JobError, int]] = []
    with Proxy(address(s3), before=lambda request: refusal if refusing.is_set() else None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        store = open_store(f"s3://{bucket}/out")
        with uploader(store, on_failure=lambda *failure: failures.append(failure), loud_after=3) as up:
            up.submit(snapshot(tmp_path, 1), 1, epoch=0)
            deadline = time.monotonic() + 30
            while len(failures) < 4 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert (tmp_path / "snapshot-1/state").exists()
            assert not up.wait(0.01)
            assert up.error is not None
            refusing.clear()
            assert up.wait(30)
            assert up.error is None
            assert steps(store) == [1]
    assert [number for _, _, number in failures[:4]] == [1, 2, 3, 4]
    assert failures[0][1].exit_code == 77
    levels = [record.levelno for record in caplog.records if "could not be uploaded" in record.message]
    assert levels[:4] == [logging.WARNING, logging.WARNING, logging.ERROR, logging.ERROR]


def test_a_lost_lease_ends_the_waiting(store: Store, tmp_path: Path) -> None:
    lease = acquire(store, "a", 30)
    with uploader(store, lease=lease) as up:
        lease.release()
        up.submit(snapshot(tmp_path, 1), 1, epoch=0)
        assert not up.wait(30)
        assert isinstance(up.error, Preempted)
    assert steps(store) == []
    assert (tmp_path / "snapshot-1").exists()


def test_a_lease_that_ran_out_while_nobody_came_is_had_back(store: Store, tmp_path: Path) -> None:
    """A store that was away for longer than a lease lives must not be the end of all checkpoints."""
    now = [0.0]
    with acquire(store, "a", 30, clock=lambda: now[0]) as lease, uploader(store, lease=lease) as up:
        now[0] = 31.0
        up.submit(snapshot(tmp_path, 1), 1, epoch=0)
        assert up.wait(30)
    assert steps(store) == [1]


def test_failures_of_long_ago_do_not_end_the_wait_for_the_last_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("in the way, as a store that is down")
    store = open_store(str(tmp_path / "store"))
    with uploader(store, first_pause=60.0) as up:
        up.submit(snapshot(tmp_path, 1), 1, epoch=0)
        while not up.failures:
            assert not up.wait(0.01)
        up.failures = MOST_FAILURES
        (tmp_path / "store").unlink()
        began = time.monotonic()
        wait_for_uploads(up, Preemption())
        assert time.monotonic() - began < 30
    assert steps(store) == [1]


def test_leaving_in_a_hurry_does_not_wait(tmp_path: Path) -> None:
    written = Future[None]()
    with pytest.raises(KeyError), uploader(open_store(str(tmp_path / "store"))) as up:
        up.submit(snapshot(tmp_path, 1), 1, epoch=0, written=written)
        raise KeyError
    written.set_result(None)
    up.close()
