"""What a run says about itself."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from job.errors import DataError, Preempted
from job.record import Record, bytes_text
from job.store import open_store
from tests.s3 import address
from tests.store.proxy import Proxy


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(open_store(str(tmp_path / "output")), tmp_path, name="test", attempt=1)


def status(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "output" / "status.json").read_text())


@pytest.mark.parametrize(
    ("error", "state", "code", "reason"),
    [
        (DataError("row 3\nis bad"), "failed", 65, "row 3 is bad"),
        (Preempted("stopped"), "preempted", 75, "stopped"),
        (KeyError("patient name"), "failed", 70, "a bug: KeyError"),
    ],
)
def test_every_ending_is_written_with_its_code_and_reason(record, tmp_path, error, state, code, reason):
    with pytest.raises(type(error)), record.kept():
        raise error
    assert {"state": state, "exit_code": code, "reason": reason}.items() <= status(tmp_path).items()


def test_a_good_ending_is_published(record: Record, tmp_path: Path):
    with record.kept(), record.stage("train"):
        assert status(tmp_path)["stage"] == "train"
    assert status(tmp_path)["state"] == "published"


def test_the_heartbeat_carries_the_latest_numbers(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import time

    import job.record

    monkeypatch.setattr(job.record, "HEARTBEAT_SECONDS", 0.05)
    with record.kept():
        record.update(step=7)
        deadline = time.monotonic() + 60
        while not (tmp_path / "output" / "status.json").exists() or status(tmp_path).get("step") != 7:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_store_that_does_not_answer_holds_up_nobody_who_changes_a_field(
    s3: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each training step does, while the heartbeat writes."""
    answers = threading.Event()
    with Proxy(address(s3), before=lambda request: None if answers.wait(60) else b"") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        record = Record(open_store(f"s3://{bucket}/out"), tmp_path)
        beat = threading.Thread(target=record.write)
        beat.start()
        while not proxy.seen:
            assert beat.is_alive()
        record.update(step=7)
        assert record.where() == "plan, step 7"
        assert beat.is_alive()
        answers.set()
        beat.join()


def test_a_store_that_fails_is_reported_once_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("in the way")
    record = Record(open_store(str(tmp_path / "file")), tmp_path)
    with caplog.at_level("WARNING", "job"), record.kept():
        record.write(step=1)
        record.write(step=2)
    assert sum("status is not written" in message for message in caplog.messages) == 1


def test_numbers_go_with_a_checkpoint_and_come_back_with_it(record: Record, tmp_path: Path):
    saved = tmp_path / "checkpoint"
    saved.mkdir()
    record.numbers(step=1, loss=2.0)
    record.copy_numbers(saved)
    record.numbers(step=2, loss=1.0)
    record.resume_numbers(saved)
    assert [line["step"] for line in record.read_numbers()] == [1]
    record.resume_numbers(None)
    assert record.read_numbers() == []


def test_sizes_are_for_people():
    assert [bytes_text(n) for n in (999, 1500, 2_000_000, 21.3e9)] == ["999 B", "1.5 kB", "2.0 MB", "21.3 GB"]


KERNELS = "import sys; from job.scratch import CACHES, check_kernels; check_kernels(dict.fromkeys(CACHES, sys.argv[1]))"


def test_a_scratch_from_which_nothing_can_be_executed_is_told_where_kernels_are_compiled(tmp_path: Path):
    def check(before: str) -> str:
        script = f'{before}; exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", KERNELS, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr

    if os.getuid() != 0 or "denied" in check(f"mount -t tmpfs none {tmp_path}"):
        pytest.skip("nothing can be mounted here")
    assert check("true") == ""
    said = check(f"mount -t tmpfs -o noexec none {tmp_path}")
    assert f"NotAllowed: scratch folder {tmp_path} is mounted noexec" in said
