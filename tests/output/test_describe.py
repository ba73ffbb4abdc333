"""What an output says about its job."""

import json
import re
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from job.errors import DataError
from job.output.describe import describe_all, describe_status, has_ended, read_status
from job.store import OwnedStore, open_store


@pytest.fixture
def store(tmp_path: Path) -> OwnedStore:
    return OwnedStore(open_store(str(tmp_path / "output")))


def test_a_metric_without_an_interval_is_shown_in_the_status(store: OwnedStore):
    value, none = {"value": 0.5, "low": None, "high": None, "n": 2}, {"value": None, "low": None, "high": None, "n": 2}
    metrics = {"before": {"f1": none}, "after": {"f1": value}, "change": {"f1": none}}
    store.write(
        "RESULT.json", json.dumps({"metrics": metrics, "verdict": {"metric": "f1", "said": "too few rows"}}).encode()
    )
    assert "– →    0.5000  (too few rows for an interval)" in describe_status(store)
    assert "\nverdict on f1: too few rows\n" in describe_status(store)


def test_a_status_tells_when_the_job_was_last_heard_of(store: OwnedStore):
    def shown(seconds: float, **more: Any) -> str:
        then = (datetime.now(UTC) - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")
        running = {"state": "running", "stage": "train", "step": 3, "steps": 9, "seconds_left": 70, "updated": then}
        store.write("status.json", json.dumps(running | more).encode())
        return describe_status(store)

    assert re.search(
        r"running, stage train; last sign of life 1[0-2] s ago\nstep 3 of 9\ntraining ends in about 70 s", shown(10)
    )
    assert re.search(r"no sign of life for 4[0-2] s in stage train; .* killed, or is cut off from its store", shown(40))
    assert "training ends" not in shown(40)
    assert "stage evaluate before, 32 of 200 rows" in shown(1, stage="evaluate before", rows=32, of_rows=200)
    assert "training ends" not in shown(1, stage="evaluate after")


def test_the_primary_metric_comes_first_with_its_change_and_the_others_as_in_the_report(store: OwnedStore):
    value = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 90}
    metrics = {when: dict.fromkeys(("rougeL", "bleu", "f1"), value) for when in ("before", "after", "change")}
    store.write("RESULT.json", json.dumps({"metrics": metrics, "verdict": {"metric": "f1", "said": "better"}}).encode())
    verdict, first, second, third, _ = describe_status(store).splitlines()[1:]
    assert verdict == "verdict on f1: better"
    assert re.fullmatch(r"  f1 +0\.5000 → +0\.5000  \(\+0\.5000, 95 % interval \+0\.4000 to \+0\.6000\)", first)
    assert second.startswith("  rougeL ")
    assert third.startswith("  bleu ")


@pytest.mark.parametrize(
    ("status", "ended"),
    [
        ({"state": "running", "updated": "2020-01-01T00:00:00Z"}, False),  # silent: it may come back
        ({"state": "preempted", "exit_code": 75}, False),
        ({"state": "failed", "exit_code": 69}, False),
        ({"state": "failed", "exit_code": 65}, True),
        ({"state": "failed", "exit_code": 70}, True),
    ],
)
def test_a_job_has_ended_if_nothing_starts_it_again(store: OwnedStore, status: dict[str, Any], ended: bool):
    store.write("status.json", json.dumps(status).encode())
    assert has_ended(read_status(store)) is ended
    store.write("RESULT.json", b"{}")
    assert has_ended(read_status(store))


def test_jobs_below_a_prefix_are_listed(tmp_path: Path):
    with pytest.raises(DataError, match="holds no job: there is no status.json below it"):
        [*describe_all(open_store(str(tmp_path)))]
    for place in ("a/1", "b"):
        (tmp_path / place / "checkpoints").mkdir(parents=True)
    failed = {"state": "failed", "exit_code": 65, "reason": "no rows", "step": 2, "steps": 9}
    (tmp_path / "a" / "1" / "status.json").write_text(json.dumps(failed))
    (tmp_path / "b" / "RESULT.json").write_text(json.dumps({"verdict": {"metric": "f1", "said": "better"}}))
    (tmp_path / "c").mkdir()
    lines = [*describe_all(open_store(str(tmp_path)))]
    assert lines == ["a/1: failed, exit 65: no rows, step 2 of 9", "b: published; f1: better"]
    assert [*describe_all(open_store(str(tmp_path / "b")))] == [".: published; f1: better"]


def test_watching_prints_what_changes_and_ends_with_the_code_of_the_job(tmp_path: Path):
    status = {
        "state": "running",
        "stage": "train",
        "step": 3,
        "updated": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    (tmp_path / "status.json").write_text(json.dumps(status))
    command = [sys.executable, "-m", "job", "status", "--watch", "--json", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        time.sleep(0.1)
        (tmp_path / "new").write_text(json.dumps(status | {"state": "failed", "exit_code": 65, "reason": "no rows"}))
        (tmp_path / "new").rename(tmp_path / "status.json")
        rest = [json.loads(line) for line in process.stdout]
    assert first["silent_seconds"] < 30
    assert [first["state"], *(line["state"] for line in rest)] == ["running", "failed"]
    assert process.returncode == 65
