"""docker/rented-box.sh, with stand-ins for docker and for the commands and addresses of those who rent boxes out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from job.errors import EXIT_CODES
from tests.conftest import ROOT

SCRIPT = ROOT / "docker/rented-box.sh"
DOCKER = """#!/bin/bash
echo "docker $*" >> {calls}
if [ "$1 $2" = "image inspect" ]; then echo registry/image@sha256:abc; fi
[ "$1" = run ] || exit 0
echo "$JOB_SPEC" > {calls}.spec
[ -z "${{FAKE_WAIT:-}}" ] || {{ trap 'exit 75' TERM; echo waiting >> {calls}; while :; do sleep 0.05; done; }}
code=$(head -n 1 {codes}); sed -i 1d {codes}
exit "$code"
"""


@pytest.fixture
def box(tmp_path: Path) -> dict[str, str]:
    """Variables under which the script meets only stand-ins; each writes what it was asked to `calls`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    calls = tmp_path / "calls"
    calls.touch()
    for name in ("runpodctl", "vastai"):
        (programs / name).write_text(
            f'#!/bin/bash\necho "{name} $*" >> {calls}\nrm {calls}.broken 2>/dev/null && exit 1; true\n'
        )
    (programs / "docker").write_text(DOCKER.format(calls=calls, codes=tmp_path / "codes"))
    for program in programs.iterdir():
        program.chmod(0o755)
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "JOB_SPEC": "s3://bucket/spec.yaml",
        "JOB_IMAGE": "registry/image",
        "JOB_RESTART_SECONDS": "0",
        "RUNPOD_API": "http://127.0.0.1:9",  # nothing listens there
        "AWS_SECRET_ACCESS_KEY": "do-not-show",
    }


def rent(box: dict[str, str], tmp_path: Path, codes: list[int], **more: str) -> tuple[int, list[str]]:
    """The script's exit code, and what the stand-ins were asked."""
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    done = subprocess.run([SCRIPT], env=box | more, capture_output=True, text=True, check=False, timeout=200)
    return done.returncode, (tmp_path / "calls").read_text().splitlines()


def test_it_runs_until_done_by_exit_code_and_then_stops_the_box(box: dict[str, str], tmp_path: Path):
    for row in EXIT_CODES:
        (tmp_path / "calls").write_text("")
        codes = [row.code, 0] if row.slurm == "requeue" else [row.code]
        code, calls = rent(box, tmp_path, codes, RUNPOD_POD_ID="pod1")
        assert code == codes[-1]
        assert [call.split()[1] for call in calls if call.startswith("docker")].count("run") == len(codes), row
        assert calls[-1] == "runpodctl pod stop pod1", row
        assert "do-not-show" not in str(calls)


def test_a_job_that_is_killed_is_tried_again(box: dict[str, str], tmp_path: Path):
    code, calls = rent(box, tmp_path, [137, 139, 0], RUNPOD_POD_ID="pod1")
    assert (code, sum("docker run" in call for call in calls)) == (0, 3)


def test_it_gives_up_after_so_many_attempts_and_stops_the_box(box: dict[str, str], tmp_path: Path):
    code, calls = rent(box, tmp_path, [69] * 9, JOB_MAX_RESTARTS="2", CONTAINER_ID="77", CONTAINER_API_KEY="key")
    assert code == 69
    assert sum("docker run" in call for call in calls) == 2
    assert calls[-1] == "vastai stop instance 77 --api-key key"


def test_a_box_that_it_cannot_stop_is_no_success(box: dict[str, str], tmp_path: Path):
    assert rent(box, tmp_path, [0])[0] == 1
    assert rent(box, tmp_path, [0], JOB_STOP_COMMAND="true")[0] == 0


def test_it_is_stopped_though_the_provider_fails_once_and_the_number_of_restarts_is_none(
    box: dict[str, str], tmp_path: Path
):
    (tmp_path / "calls.broken").touch()
    code, calls = rent(box, tmp_path, [0], CONTAINER_ID="77", CONTAINER_API_KEY="key", JOB_MAX_RESTARTS="0")
    assert (code, calls[-2:]) == (0, ["vastai stop instance 77 --api-key key"] * 2)


def test_a_pod_is_stopped_by_an_old_runpodctl_where_nothing_else_does(box: dict[str, str], tmp_path: Path):
    (tmp_path / "calls.broken").touch()
    code, calls = rent(box, tmp_path, [0], RUNPOD_POD_ID="pod1")
    assert (code, calls[-2:]) == (0, ["runpodctl pod stop pod1", "runpodctl stop pod pod1"])


def test_a_spec_s_file_travels_as_text(box: dict[str, str], tmp_path: Path):
    (tmp_path / "my spec.yaml").write_text("name: one")
    rent(box, tmp_path, [0], JOB_SPEC=str(tmp_path / "my spec.yaml"), JOB_STOP_COMMAND="true")
    assert (tmp_path / "calls.spec").read_text() == "name: one\n"


@pytest.mark.parametrize("moment", ["waiting", "pause"])
def test_a_box_that_is_taken_away_is_left_with_75_and_not_stopped(box: dict[str, str], tmp_path: Path, moment: str):
    """While the job runs, which is told, and between two attempts, of which the second does not begin."""
    (tmp_path / "codes").write_text("75\n")
    more = {"RUNPOD_POD_ID": "pod1", "JOB_RESTART_SECONDS": "600"} | ({"FAKE_WAIT": "1"} if moment == "waiting" else {})
    process = subprocess.Popen([SCRIPT], env=box | more, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (pausing(process) if moment == "pause" else "waiting" in (tmp_path / "calls").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 75
    calls = (tmp_path / "calls").read_text()
    assert calls.count("docker run") == 1
    assert "runpodctl" not in calls


def pausing(process: subprocess.Popen[bytes]) -> bool:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return any(command_of(child) == "sleep" for child in children)


def command_of(process: str) -> str | None:
    """None if it has ended in the meantime."""
    with suppress(OSError):
        return Path(f"/proc/{process}/comm").read_text().strip()
    return None


class Provider(HTTPServer):
    """Keeps what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str | None, object]] = []
        super().__init__(("127.0.0.1", 0), Answer)


class Answer(BaseHTTPRequestHandler):
    server: Provider

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.command, self.path, self.headers["Authorization"], json.loads(body or "null")))
        self.send_response(410 if self.path.startswith("/v1/pods") else 200)  # RunPod's first API ended in 2026
        self.end_headers()

    do_PUT = do_POST

    def log_message(self, *_: object) -> None:
        return


def test_without_their_command_lines_it_asks_the_providers_themselves(box: dict[str, str], tmp_path: Path):
    for name in ("runpodctl", "vastai"):
        (tmp_path / "bin" / name).unlink()
    provider = Provider()
    threading.Thread(target=provider.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{provider.server_port}"
    api = {"RUNPOD_API": url, "VAST_API": url, "LAMBDA_API": url}
    boxes = (
        {"RUNPOD_POD_ID": "pod1", "RUNPOD_API_KEY": "k1"},
        {"CONTAINER_ID": "77", "CONTAINER_API_KEY": "k2"},
        {"LAMBDA_INSTANCE_ID": "i-9", "LAMBDA_API_KEY": "k3"},
    )
    codes = [rent(box, tmp_path, [0], **api, **one)[0] for one in boxes]
    provider.shutdown()
    provider.server_close()
    assert codes == [0, 0, 0]
    assert provider.asked == [
        ("POST", "/v2/pods/pod1/action", "Bearer k1", {"action": "stop"}),
        ("PUT", "/api/v0/instances/77/", "Bearer k2", {"state": "stopped"}),
        ("POST", "/api/v1/instance-operations/terminate", "Bearer k3", {"instance_ids": ["i-9"]}),
    ]
