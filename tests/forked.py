"""Runs `python -m job …` without importing its libraries each time, which takes longer than most of the jobs do.

A process without threads imports them once and forks itself for each job: `python -P tests/forked.py SOCKET`, where SOCKET is the
number of a Unix socket. A request is a JSON object with the arguments and the environment, and two open files, for what the
job writes to stdout and stderr. The answers are the job's process id, and then its exit code as `os.waitstatus_to_exitcode`
gives it.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ROOMS = (
    "run",
    "publish",
    "train.stage",
    "evaluate.stage",
    "export.gate",
    "export.merge",
    "report.page",
    "data.prepare",
)
OURS = ("JOB_", "AWS_", "PYTEST_")
"""Variables that no library reads while it is imported."""


class Forks:
    """The process that forks, started with the first job."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        self.environment = dict(os.environ)
        with theirs:
            command = [sys.executable, "-P", __file__, str(theirs.fileno())]
            there = {**self.environment, "PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT, env=there)

    def suits(self, environment: dict[str, str]) -> bool:
        """Whether a forked job would see the environment as one of its own."""
        changed = {name for name, _ in self.environment.items() ^ environment.items()}
        return all(name.startswith(OURS) for name in changed)

    def run(
        self, arguments: list[str], environment: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            request = json.dumps([arguments, environment]).encode()
            socket.send_fds(self.socket, [request], [out.fileno(), err.fileno()])
            pid = self.answer()
            try:
                code = self.answer(timeout)
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                code = self.answer()
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(["job", *arguments], code, out.read(), err.read())

    def answer(self, timeout: float | None = None) -> int:
        self.socket.settimeout(timeout)
        return int(self.socket.recv(20))

    def close(self) -> None:
        self.socket.close()
        self.process.wait()


def serve(server: socket.socket) -> None:
    """Answers until the other end is closed. Returns in each fork as well, once for the job that it is to be."""
    import importlib

    for room in ROOMS:
        importlib.import_module(f"job.{room}")
    while True:
        request, files, _, _ = socket.recv_fds(server, 1 << 20, 2)
        if not request:
            return
        if (pid := os.fork()) == 0:
            server.close()
            become(files, *json.loads(request))
            return
        for file in files:
            os.close(file)
        server.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        server.send(str(os.waitstatus_to_exitcode(status)).encode())


def become(files: list[int], arguments: list[str], environment: dict[str, Any]) -> None:
    for file, number in zip(files, (1, 2), strict=True):
        os.dup2(file, number)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["job", *arguments]
    runpy.run_module("job", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
