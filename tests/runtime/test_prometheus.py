"""What Prometheus is told."""

import re
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from job.errors import SpecError
from job.runtime.prometheus import exposition, serve_metrics
from job.runtime.status import Record
from job.store import open_store


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(open_store(str(tmp_path / "output")), tmp_path, name='the "best" run', attempt=2)


def test_the_numbers_are_those_of_the_status(record: Record):
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    with serve_metrics(record, port):
        record.update(step=7, loss=1.25, stage="train")
        answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics")
        with answer:
            lines = answer.read().decode().splitlines()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/")
    samples = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert samples['vision_lora_job_info{name="the \\"best\\" run",stage="train",state="running"}'] == "1"
    assert samples["vision_lora_job_step"] == "7"
    assert samples["vision_lora_job_loss"] == "1.25"
    assert samples["vision_lora_job_attempt"] == "2"
    assert "vision_lora_job_seconds_left" not in samples
    typed = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert typed == {re.sub(r"\{.*", "", name) for name in samples}


@pytest.mark.parametrize("port", [70000, -1])
def test_what_is_no_port_is_a_wrong_setting(record: Record, port: int):
    with pytest.raises(SpecError, match="JOB_METRICS_PORT"), serve_metrics(record, port):
        pass


def test_what_was_measured_is_there_before_and_after(record: Record):
    assert "vision_lora_job_metric" not in exposition(record.snapshot())
    record.update(measured={"rougeL": {"before": 0.2, "after": 0.5}})
    assert 'vision_lora_job_metric{metric="rougeL",when="after"} 0.5\n' in exposition(record.snapshot())
