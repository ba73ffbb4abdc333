"""What a run says about itself."""

import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from job.errors import DataError, Preempted, SpecError
from job.runtime.peaks import SAMPLE_SECONDS
from job.runtime.status import Record, bytes_text, last_word, one_line, own_code, peaks_text
from job.store import open_store
from tests.conftest import ROOT
from tests.s3 import address
from tests.store.proxy import Proxy


@pytest.fixture
def record(tmp_path: Path) -> Record:
    folder = tmp_path / "scratch" / "job"
    folder.mkdir(parents=True)
    return Record(open_store(str(tmp_path / "output")), folder, name="test", attempt=1)


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


def test_what_a_bug_said_is_in_the_output_and_nowhere_else(record: Record, tmp_path: Path):
    with pytest.raises(KeyError), record.kept():
        raise KeyError("patient name")
    assert "patient name" in (tmp_path / "output" / "logs" / "failure.txt").read_text()
    assert "patient name" not in (tmp_path / "output" / "status.json").read_text()


def test_the_kubelet_learns_the_stage_and_then_the_first_ending(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    message = tmp_path / "termination-log"
    monkeypatch.setattr("job.runtime.status.TERMINATION_LOG", message)
    record.write(stage="load")
    assert not message.exists()  # no kubelet
    message.touch()
    record.write(stage="train", step=7)
    assert re.fullmatch(r"no exit was reported; last seen at \S+Z in stage train, step 7", message.read_text())
    last_word("exit 78: the spec is wrong")
    record.write(stage="train", step=8)
    last_word("exit 78: rank 0 exited with 78; the last line of its log says why")
    assert message.read_text() == "exit 78: the spec is wrong"
    last_word("exit 75: stopped on SIGTERM")
    assert message.read_text() == "exit 75: stopped on SIGTERM"


def test_a_good_ending_is_published(record: Record, tmp_path: Path):
    with record.kept(), record.stage("train"):
        assert status(tmp_path)["stage"] == "train"
    assert status(tmp_path)["state"] == "published"


def test_the_heartbeat_carries_the_latest_numbers(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import job.runtime.status

    monkeypatch.setattr(job.runtime.status, "HEARTBEAT_SECONDS", 0.05)
    with record.kept():
        record.update(step=7)
        deadline = time.monotonic() + 60
        while not (tmp_path / "output" / "status.json").exists() or status(tmp_path).get("step") != 7:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert 0 < status(tmp_path)["host_used"] < status(tmp_path)["host_limit"]


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
    assert sum("cannot write the status" in message for message in caplog.messages) == 1


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


KERNELS = "import sys; from job.runtime.scratch import CACHES, check_kernels; check_kernels(dict.fromkeys(CACHES, sys.argv[1]))"


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


def stages(tmp_path: Path) -> dict[str, Any]:
    return status(tmp_path)["stages"]


def test_a_stage_shows_what_it_held_at_most_and_the_next_one_does_not(record: Record, tmp_path: Path):
    with record.kept():
        with record.stage("large"):
            held = bytearray(b"1") * 200_000_000
            record.peaks.sample()
            del held
        with record.stage("small"):
            pass
    large, small = stages(tmp_path)["large"], stages(tmp_path)["small"]
    for name in ("host_peak", "host_anonymous"):
        assert 190_000_000 < large[name] - small[name] < 260_000_000


def test_memory_that_is_held_for_a_moment_is_seen(record: Record, tmp_path: Path):
    with record.kept(), record.stage("short"):
        before = record.peaks.end()["host_anonymous"]
        held = bytearray(b"1") * 200_000_000
        time.sleep(3 * SAMPLE_SECONDS)
        del held
    assert stages(tmp_path)["short"]["host_anonymous"] > before + 190_000_000


def test_mapped_files_count_as_host_memory_and_not_as_anonymous(record: Record, tmp_path: Path):
    (tmp_path / "weights").write_bytes(bytes(200_000_000))
    with record.kept():
        with (
            record.stage("mapped"),
            (tmp_path / "weights").open() as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            assert sum(mapped[::4096]) == 0
        with record.stage("small"):
            pass
    mapped, small = stages(tmp_path)["mapped"], stages(tmp_path)["small"]
    assert mapped["host_peak"] - small["host_peak"] > 190_000_000
    assert abs(mapped["host_anonymous"] - small["host_anonymous"]) < 50_000_000


def test_scratch_counts_what_lies_there_at_the_end_and_a_linked_file_once(tmp_path: Path):
    folder = tmp_path / "scratch" / "job"
    folder.mkdir(parents=True)
    record = Record(open_store(str(tmp_path / "output")), folder)
    with record.kept(), record.stage("merge"):
        (folder.parent / "cached").write_bytes(bytes(3_000_000))
        (folder / "merged").write_bytes(bytes(5_000_000))
        (folder / "again").hardlink_to(folder / "merged")
    assert 8_000_000 <= stages(tmp_path)["merge"]["scratch"] < 8_200_000


def test_a_stage_that_fails_leaves_its_peaks(record: Record, tmp_path: Path):
    with pytest.raises(DataError), record.kept(), record.stage("train"):
        raise DataError("row 3 is bad")
    assert {"seconds", "host_peak", "scratch"} <= stages(tmp_path)["train"].keys()
    assert record.seconds == {}


def test_the_log_line_of_a_stage_ends_with_its_peaks(record: Record, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", "job"), record.stage("export") as facts:
        facts.append("merged 21.3 GB")
    size = r"[\d.]+ [kMG]?B"
    assert re.fullmatch(
        rf"export: [\d.]+ s; merged 21.3 GB, host {size} \({size} anonymous\), scratch {size}", caplog.messages[0]
    )
    gpu = {"seconds": 1.0, "device_peak": 31.9e9, "device_reserved": 32.5e9}
    assert peaks_text(gpu) == ["device 31.9 GB (32.5 GB reserved)"]


def test_of_a_reason_that_quotes_a_long_value_both_ends_are_told():
    said = one_line(SpecError(f"scratch: {'a' * 100_000} cannot be\nused; set JOB_SCRATCH"))
    assert said.startswith("scratch: aaa")
    assert said.endswith(" cannot be used; set JOB_SCRATCH")
    assert len(said) < 10_000


def test_the_digest_of_the_job_changes_with_every_module_and_with_nothing_else(tmp_path: Path):
    package = shutil.copytree(ROOT / "job", tmp_path / "job", ignore=shutil.ignore_patterns("__pycache__"))
    first = own_code(package)
    assert first == own_code()
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "cli.pyc").write_bytes(b"compiled")
    own_code.cache_clear()
    assert own_code(package) == first
    (package / "model" / "loaded.py").write_text("# another version\n")
    own_code.cache_clear()
    changed = own_code(package)
    (package / "model" / "new.py").touch()
    own_code.cache_clear()
    assert len({first, changed, own_code(package)}) == 3
