"""torchrun, with our exit codes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from job.torchrun import translated, worker_ended
from tests.conftest import ROOT

WORKER = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if os.environ["RANK"] == sys.argv[2]:
    sys.exit(int(sys.argv[3]))
(pathlib.Path(sys.argv[1]) / os.environ["RANK"]).touch()
time.sleep(60)
"""


@pytest.fixture
def torchrun(tmp_path: Path):
    (tmp_path / "worker.py").write_text(WORKER)

    def start(*arguments: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "job.torchrun", "--standalone", "--nproc-per-node=2"]
        return subprocess.Popen(
            [*command, str(tmp_path / "worker.py"), str(tmp_path), *arguments], cwd=ROOT, stderr=subprocess.PIPE
        )

    return start


def test_it_ends_as_the_worker_that_failed_first(torchrun):
    process = torchrun("1", "78")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 78
    assert stderr.splitlines()[-1] == b"exit 78: rank 1 exited with 78; the last line of its log says why"


def test_stopped_it_stops_its_workers_and_ends_with_75(torchrun, tmp_path: Path):
    process = torchrun("none", "0")
    deadline = time.monotonic() + 60
    while not ((tmp_path / "0").exists() and (tmp_path / "1").exists()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75


ALONE = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (
            ["--standalone", "--nproc-per-node=gpu"],
            78,
            "--nproc-per-node is gpu, and this machine has no usable CUDA GPU",
        ),
        (["--standalone", "--nproc-per-node=few"], 78, "--nproc-per-node few: Unsupported nproc_per_node value"),
        (["--standalone", "--nproc=2"], 78, "wrong arguments"),
        ([*ALONE, "--rdzv-conf=join_timeout=1,timeout=1"], 69, "the nodes of this run did not meet"),
        (["--standalone", "--nproc-per-node=0"], 78, "--nproc-per-node 0: no process could be started"),
        ([*ALONE[:2], "--rdzv-backend=none"], 78, "The rendezvous backend 'none' is not registered"),
    ],
)
def test_a_start_that_fails_ends_with_a_code_of_the_table(arguments: list[str], code: int, reason: str):
    """torchrun's own is 1, which a Job counts and tries again, whatever the fault."""
    command = [sys.executable, "-m", "job.torchrun", *arguments, "-m", "job", "run"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    last = ended.stderr.splitlines()[-1]
    assert (ended.returncode, last.startswith(f"exit {code}: torchrun: ")) == (code, True), ended.stderr
    assert reason in last
    assert "Traceback" not in ended.stderr


def test_help_is_no_error():
    command = [sys.executable, "-m", "job.torchrun", "--help"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, "--nproc-per-node" in ended.stdout) == (0, True)


def test_a_worker_that_was_killed_for_want_of_memory_is_told_from_another():
    ended = [worker_ended(1, code, short=short) for code, short in ((-9, True), (-9, False), (-11, True), (71, True))]
    assert [each.exit_code for each in ended] == [71, 137, 139, 71]
    assert "host memory ran out" in str(ended[0])


@pytest.mark.parametrize(("code", "ours"), [(75, 75), (-signal.SIGKILL, 137), (1, 70), (79, 79)])
def test_a_worker_s_code_is_one_of_the_table(code: int, ours: int):
    assert translated(code) == ours
