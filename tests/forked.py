"""Runs `python -m job …` without importing its libraries each time, which takes longer than most of the jobs do.

A process without threads imports them once and forks itself for each job: `python -P tests/forked.py SOCKET`, where SOCKET is the
number of a Unix socket. A request is a JSON object with the arguments, the environment and whether the job leads a session of its
own, and three open files: for what the job writes to stdout and to stderr, and a socket. The answers on that socket are the job's
process id, and then its exit code as `os.waitstatus_to_exitcode` gives it. Jobs may run side by side.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

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
OURS = (
    "JOB_",
    "AWS_",
    "PYTEST_",
    "GDCM_",
    "TORCHINDUCTOR_CACHE_DIR",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_",
    "PYTHONFAULTHANDLER",
)
"""Variables that no library reads while it is imported."""


class Forked:
    """A job in a process of its own, with the methods of `subprocess.Popen` that tests use."""

    def __init__(
        self,
        server: socket.socket,
        arguments: list[str],
        environment: dict[str, str],
        stderr: TextIO | None,
        own_session: bool,
    ) -> None:
        self.files = tuple(tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115  # `wait` closes them
        self.said = "", ""
        self.returncode: int | None = None
        self.keeper, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        request = json.dumps([arguments, environment, own_session]).encode()
        with theirs:
            out, err = self.files
            socket.send_fds(server, [request], [out.fileno(), (stderr or err).fileno(), theirs.fileno()])
        self.pid = int(self.keeper.recv(20))

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.keeper.settimeout(timeout)
            try:
                code = int(self.keeper.recv(20))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired("job", timeout or 0) from None
            self.keeper.close()
            for file in self.files:
                file.seek(0)
            out, err = self.files
            self.said = out.read(), err.read()
            out.close()
            err.close()
            self.returncode = code
        return self.returncode

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end. Returns stdout and stderr; the latter is empty if it went to a file of the caller."""
        self.wait(timeout)
        return self.said

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forks:
    """The process that forks."""

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

    def start(
        self,
        arguments: list[str],
        environment: dict[str, str],
        stderr: TextIO | None = None,
        own_session: bool = False,
    ) -> Forked:
        assert self.suits(environment), self.environment.items() ^ environment.items()
        return Forked(self.socket, arguments, environment, stderr, own_session)

    def run(
        self, arguments: list[str], environment: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(arguments, environment)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
        return subprocess.CompletedProcess(["job", *arguments], process.wait(), *process.said)

    def close(self) -> None:
        self.socket.close()
        self.process.wait()


def serve(server: socket.socket) -> None:
    """Answers until the other end is closed. Returns in each job as well, once it is over."""
    import importlib

    for room in ROOMS:
        importlib.import_module(f"job.{room}")
    gc.freeze()
    while True:
        request, files, _, _ = socket.recv_fds(server, 1 << 20, 3)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not request:
            return
        if os.fork() == 0:
            server.close()
            keep(files, *json.loads(request))
            return
        for file in files:
            os.close(file)


def keep(files: list[int], arguments: list[str], environment: dict[str, Any], own_session: bool) -> None:
    """Forks the job and tells how it ended. Returns in the job alone."""
    *written, number = files
    if (pid := os.fork()) == 0:
        os.close(number)
        become(written, arguments, environment, own_session)
        return
    for file in written:
        os.close(file)
    with socket.socket(fileno=number) as answers:
        answers.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        with suppress(BrokenPipeError):
            answers.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def become(written: list[int], arguments: list[str], environment: dict[str, Any], own_session: bool) -> None:
    for file, number in zip(written, (1, 2), strict=True):
        os.dup2(file, number)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if own_session:
        os.setsid()
    if "PYTHONFAULTHANDLER" in environment:
        faulthandler.enable()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["job", *arguments]
    runpy.run_module("job", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
