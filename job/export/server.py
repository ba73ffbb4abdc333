"""Runs a vLLM server in a process group of its own, asks it over its OpenAI-compatible interface, and never leaves it behind."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from job.errors import GateRefused

if TYPE_CHECKING:
    from job.export.questions import Ask

GUARD = 'exec 3<&0; (cat <&3 >/dev/null; kill -9 0) & "$@" </dev/null 3<&-; echo "ended with exit code $?"; kill -9 0'
"""Shell that leads the server's process group and kills all of it once its standard input closes, which happens however this
process ends, or once the server has ended."""
OURS = ("JOB_", "PYTHON", "AWS_", "HF_TOKEN", "HUGGING_FACE", "WANDB_", "MLFLOW_", "TORCHELASTIC_", "VLLM_API_KEY")
RANKS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
"""Variables that a server is not given: credentials, our settings, and those of a distributed run, which it would join."""
OK = HTTPStatus.OK
PAUSE, GONE_SECONDS = 0.5, 10.0
TOLD = 3
"""Lines of the server's log that an error shows."""


@contextmanager
def running(command: list[str], scratch: Path, seconds: float, variables: Mapping[str, str]) -> Iterator[Ask]:
    """Start `command`, a vLLM server without host and port, and yield a function that posts a chat request once it is ready.
    All of the server's processes are gone when the block ends.

    `scratch` is a folder for its log and caches; `seconds` limits start and answers together. Raises GateRefused with the end
    of its log if it ends, does not start in time or cannot answer.
    """
    deadline, key, port = time.monotonic() + seconds, secrets.token_urlsafe(), _free_port()
    scratch.mkdir(parents=True, exist_ok=True)
    log = scratch / "server.log"
    with log.open("wb") as said:
        process = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, "sh", *command, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=_environment(scratch, key, variables),
            cwd=scratch,  # not where `job` could be imported from
            start_new_session=True,
        )

    server = _Server(process, port, key, log, deadline, f"within export.serve.seconds {seconds:g}")
    try:
        _wait(server)
        yield partial(_ask, server)
    finally:
        _end(process)


class _Server(NamedTuple):
    process: subprocess.Popen[bytes]
    port: int
    key: str
    log: Path
    deadline: float
    limit: str


def _environment(scratch: Path, key: str, variables: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in variables.items() if not name.startswith(OURS) and name not in RANKS}
    kept.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; read on a CPU only
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_API_KEY": key,  # other users of the node may connect too
        "VLLM_CACHE_ROOT": str(scratch / "cache"),
        "XDG_CONFIG_HOME": str(scratch / "config"),
        "PYTHONUNBUFFERED": "1",
    }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait(server: _Server) -> None:
    while time.monotonic() < server.deadline:
        if server.process.poll() is not None:
            raise GateRefused(f"the server did not start; {_last_lines(server.log)}")
        with suppress(OSError, HTTPException):
            if _exchange(server, "GET", "/health", None, PAUSE)[0] == OK:
                return
        time.sleep(PAUSE)
    raise GateRefused(f"the server did not start {server.limit}; {_last_lines(server.log)}")


def _ask(server: _Server, request: dict[str, Any]) -> dict[str, Any]:
    left = max(server.deadline - time.monotonic(), PAUSE)
    try:
        status, said = _exchange(server, "POST", "/v1/chat/completions", json.dumps(request).encode(), left)
    except (OSError, HTTPException) as error:
        what = f"did not answer {server.limit}"
        if time.monotonic() < server.deadline:
            what = "ended while it answered"
            with suppress(subprocess.TimeoutExpired):
                server.process.wait(PAUSE)  # for the end of its log
        raise GateRefused(f"the server {what}; {_last_lines(server.log)}") from error
    if status != OK:
        raise GateRefused(f"the server refused a request with {status}; {_last_lines(server.log)}")
    answer: dict[str, Any] = json.loads(said)
    return answer


def _exchange(server: _Server, method: str, path: str, body: bytes | None, seconds: float) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=seconds)
    try:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.key}"}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _last_lines(log: Path) -> str:
    """Return the end of the log: its last lines that say anything, and the last error before them."""
    lines = [" ".join(line.split()) for line in log.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    errors = [line for line in lines[:-TOLD] if "Error: " in line and "WARNING" not in line]
    return f"the end of its log: {' | '.join([*errors[-1:], *lines[-TOLD:]]) or 'nothing'}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the whole process group, and wait until it is gone with its memory. Its leader is not reaped before, so that the
    group cannot be another's by then."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
    gone = time.monotonic() + GONE_SECONDS
    with suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < gone:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
