"""What Prometheus is told."""

import re
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from job.errors import SpecError
from job.metrics import serving, writing
from job.record import Record
from job.store import open_store


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(open_store(str(tmp_path / "output")), tmp_path, name='the "best" run', attempt=2)


def test_the_numbers_are_those_of_the_status(record: Record):
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    with serving(record, {"JOB_METRICS_PORT": str(port)}):
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


@pytest.mark.parametrize("port", ["http", "70000"])
def test_what_is_no_port_is_a_wrong_setting(record: Record, port: str):
    with pytest.raises(SpecError, match="JOB_METRICS_PORT"), serving(record, {"JOB_METRICS_PORT": port}):
        pass


def test_a_node_exporter_finds_the_same_in_a_file_with_what_was_measured(record: Record, tmp_path: Path):
    file = tmp_path / "metrics.prom"
    with writing(record, {"JOB_METRICS_FILE": str(file)}):
        first = file.read_text()
        record.update(step=9, measured={"rougeL": {"before": 0.2, "after": 0.5}})
    assert "vision_lora_job_step" not in first
    assert "vision_lora_job_step 9\n" in file.read_text()
    assert 'vision_lora_job_metric{metric="rougeL",when="after"} 0.5\n' in file.read_text()
    assert [path.name for path in tmp_path.glob("*prom*")] == ["metrics.prom"]


def test_a_metrics_file_that_cannot_be_written_is_a_wrong_setting(record: Record, tmp_path: Path):
    with (
        pytest.raises(SpecError, match="JOB_METRICS_FILE: .*No such file"),
        writing(record, {"JOB_METRICS_FILE": str(tmp_path / "no" / "metrics.prom")}),
    ):
        pass
