"""torchrun, with our exit codes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from job.torchrun import translated
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
    assert stderr.splitlines()[-1] == b"exit 78: rank 1 ended with 78; its own line says why"


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


@pytest.mark.parametrize(("code", "ours"), [(75, 75), (-signal.SIGKILL, 137), (1, 70), (79, 79)])
def test_a_worker_s_code_is_one_of_the_table(code: int, ours: int):
    assert translated(code) == ours
