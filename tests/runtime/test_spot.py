"""Spot notices, from local servers that speak the clouds' protocols."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import job.runtime.spot
from job.errors import Preempted
from job.runtime.preemption import Preemption
from job.runtime.spot import watch_spot_notices


class Cloud:
    """What the metadata service says now: a body, or None for 404. AWS's token is demanded as IMDSv2 does."""

    def __init__(self, kind: str) -> None:
        self.kind, self.notice, self.asked, self.confused = kind, False, 0, ""
        self.environment = dict[str, str]()

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        self.asked += 1
        if self.kind == "aws":
            if (method, path) == ("PUT", "/latest/api/token"):
                return (200, "TOKEN") if headers.get("x-aws-ec2-metadata-token-ttl-seconds") else (400, "")
            if headers.get("x-aws-ec2-metadata-token") != "TOKEN":
                return 401, ""
            right = path == "/latest/meta-data/spot/instance-action"
            body = json.dumps({"action": "terminate", "time": "2026-01-01T00:02:00Z"})
            return (200, body) if right and self.notice else (404, "")
        if self.kind == "gcp":
            if headers.get("metadata-flavor") != "Google" or path != "/computeMetadata/v1/instance/preempted":
                return 403, ""
            return 200, "TRUE" if self.notice else "FALSE"
        if headers.get("metadata") != "true" or not path.startswith("/metadata/scheduledevents?api-version="):
            return 400, ""
        events = [{"EventType": "Reboot"}] + ([{"EventType": "Preempt"}] if self.notice else [])
        return 200, json.dumps({"DocumentIncarnation": 1, "Events": events})


@pytest.fixture(params=["aws", "gcp", "azure"])
def cloud(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    state = Cloud(request.param)

    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            if state.confused:
                state.asked += 1
                self.wfile.write(state.confused.encode())
                return
            headers = {name.lower(): value for name, value in self.headers.items()}
            code, body = state.answer(self.command, self.path, headers)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_PUT = reply

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    monkeypatch.setattr(job.runtime.spot, "EVERY_SECONDS", 0.05)
    state.environment = {
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{address}/",
        "GCE_METADATA_HOST": address,
        "AZURE_METADATA_ENDPOINT": f"http://{address}",
    }
    yield state
    server.shutdown()
    server.server_close()


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_notice_becomes_a_request_with_the_clouds_own_warning_time(cloud: Cloud):
    with (
        Preemption(grace_seconds=5).listening() as preemption,
        watch_spot_notices(cloud.kind, preemption, cloud.environment),
    ):
        wait_until(lambda: cloud.asked > 5)
        assert not preemption.requested
        cloud.notice = True
        wait_until(lambda: preemption.requested)
        assert "a spot notice of" in preemption.reason
        ahead = {"aws": 120, "gcp": 30, "azure": 30}[cloud.kind]
        assert ahead - 20 < preemption.remaining <= ahead


def test_a_notice_interrupts_what_has_nothing_to_keep(cloud: Cloud):
    cloud.notice = True
    began = time.monotonic()
    with (
        Preemption().listening() as preemption,
        pytest.raises(Preempted, match="a spot notice"),
        watch_spot_notices(cloud.kind, preemption, cloud.environment),
        preemption.leave_at_once(),
    ):
        time.sleep(60)
    assert time.monotonic() - began < 50


def test_a_service_that_does_not_answer_is_told_once_and_stops_nothing(cloud: Cloud, caplog: pytest.LogCaptureFixture):
    nowhere = {name: "http://127.0.0.1:9" if "HOST" not in name else "127.0.0.1:9" for name in cloud.environment}
    with Preemption().listening() as preemption, caplog.at_level("WARNING", "job"):
        with watch_spot_notices(cloud.kind, preemption, nowhere):
            wait_until(lambda: caplog.messages)
            time.sleep(0.5)
        assert not preemption.requested
    assert len([message for message in caplog.messages if "no usable answer" in message]) == 1


@pytest.mark.parametrize(
    "nonsense", ["no http", 'HTTP/1.0 200 OK\r\n\r\n{"Events": null}', "HTTP/1.0 200 OK\r\n\r\n[1]"]
)
def test_a_service_that_answers_nonsense_is_asked_on(cloud: Cloud, nonsense: str):
    cloud.confused = nonsense
    with Preemption().listening() as preemption, watch_spot_notices(cloud.kind, preemption, cloud.environment):
        wait_until(lambda: cloud.asked > 3)
        assert not preemption.requested
        cloud.confused, cloud.notice = "", True
        wait_until(lambda: preemption.requested)


def test_nothing_is_asked_unless_the_spec_says_so(cloud: Cloud):
    with watch_spot_notices(None, Preemption(), cloud.environment):
        time.sleep(0.2)
    assert cloud.asked == 0
