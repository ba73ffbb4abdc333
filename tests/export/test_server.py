"""A server answers, or its end is one sentence; and nothing of it outlives the block, whatever ends that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.errors import GateRefused, Preempted
from job.export.server import running
from job.runtime.preemption import Preemption

SERVER = """
import http.server, json, os, pathlib, subprocess, sys, time
mode, port = sys.argv[1], int(sys.argv[-1])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # as vLLM's engine
pathlib.Path("pids").write_text(f"{os.getpid()} {child.pid}")
pathlib.Path("environment").write_text(json.dumps(dict(os.environ)))
print("loading\\n\\nValueError: no processor\\n" + "more\\n" * 5, flush=True)
if mode == "fails":
    sys.exit(3)
if mode == "hangs":
    time.sleep(600)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        if mode == "dies":
            os._exit(9)
        if mode == "is silent":
            time.sleep(600)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        right = self.headers["Authorization"] == "Bearer " + os.environ["VLLM_API_KEY"] and self.path == "/v1/chat/completions"
        self.send_response(400 if mode == "refuses" or not right else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"echo": asked}).encode())

    def log_message(self, *_):
        pass

http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
END = "the end of its log: ValueError: no processor | more | more"


def command(mode: str, folder: Path) -> list[str]:
    (folder / "server.py").write_text(SERVER)
    return [sys.executable, str(folder / "server.py"), mode]


def pids(folder: Path) -> list[int]:
    for _ in range(200):
        if (folder / "pids").exists() and (found := (folder / "pids").read_text().split())[1:]:
            return [int(pid) for pid in found]
        time.sleep(0.1)
    raise AssertionError("the server never started")


def gone(pid: int) -> bool:
    """Ended, whether or not anyone has taken note of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def all_gone(folder: Path) -> bool:
    for _ in range(100):
        if all(map(gone, pids(folder))):
            return True
        time.sleep(0.1)
    return False


@pytest.fixture(autouse=True)
def _none_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert all_gone(tmp_path)


def test_a_server_answers_and_is_given_neither_credentials_nor_our_settings(tmp_path: Path) -> None:
    ours = {
        **os.environ,
        "JOB_SCRATCH": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "HF_TOKEN": "x",
        "PYTHONPATH": "x",
        "RANK": "1",
    }
    with running(command("answers", tmp_path), tmp_path, 60, ours) as ask:
        assert ask({"messages": ["é"]}) == {"echo": {"messages": ["é"]}}
        given = (tmp_path / "environment").read_text()
        assert not any(f'"{name}"' in given for name in ours.keys() - os.environ.keys())
        assert '"HF_HUB_OFFLINE": "1"' in given


@pytest.mark.parametrize(
    ("mode", "seconds", "said"),
    [
        ("fails", 60.0, f"the server did not start; {END} | ended with exit code 3"),
        ("hangs", 2.0, f"the server did not start within export.serve.seconds 2; {END} | more"),
        ("dies", 60.0, f"the server ended while it answered; {END} | ended with exit code 9"),
        ("is silent", 4.0, f"the server did not answer within export.serve.seconds 4; {END} | more"),
        ("refuses", 60.0, f"the server refused a request with 400; {END} | more"),
    ],
)
def test_a_server_that_fails_is_one_sentence_with_the_end_of_its_log(
    mode: str, seconds: float, said: str, tmp_path: Path
) -> None:
    with pytest.raises(GateRefused) as error, running(command(mode, tmp_path), tmp_path, seconds, os.environ) as ask:
        ask({})
    assert str(error.value) == said


def test_a_preemption_notice_ends_it_at_once(tmp_path: Path) -> None:
    preemption = Preemption(grace_seconds=30)
    with preemption.listening(), pytest.raises(Preempted):
        began = time.monotonic()
        with preemption.leave_at_once(), running(command("is silent", tmp_path), tmp_path, 60, os.environ) as ask:
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            ask({})
    assert time.monotonic() - began < 20


def test_it_ends_with_a_job_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib; from job.export.server import running\n"
        "with running(sys.argv[2:], pathlib.Path(sys.argv[1]), 60, os.environ) as ask: ask({})"
    )
    words = [sys.executable, "-c", program, str(tmp_path), *command("is silent", tmp_path)]
    job = subprocess.Popen(words)
    assert not any(map(gone, pids(tmp_path)))
    job.kill()
    job.wait()
    assert all_gone(tmp_path)
