"""What the run says to Prometheus: a few numbers over HTTP, where `JOB_METRICS_PORT` asks for them.

The text is Prometheus' exposition format, version 0.0.4. There is nothing in it that a status does not hold.
"""

from __future__ import annotations

import http.server
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from job.errors import SpecError
from job.record import Record

log = logging.getLogger("job")

GAUGES = {
    "step": "Optimizer steps done.",
    "steps": "Optimizer steps planned.",
    "loss": "Loss of the last step that was logged.",
    "seconds_left": "Estimated seconds until training ends.",
    "last_checkpoint": "Step of the newest checkpoint that is safe in the store.",
    "checkpoint_seconds": "How long its upload took.",
    "checkpoint_failures": "Checkpoints in a row that did not reach the store.",
    "attempt": "Attempts at this output so far.",
}


@contextmanager
def serving(record: Record, environment: Mapping[str, str]) -> Iterator[None]:
    """Serve `/metrics` on `JOB_METRICS_PORT` while the block runs; nothing where it is not set.

    Raises SpecError for what is no port, or one that is taken.
    """
    text = environment.get("JOB_METRICS_PORT", "").strip()
    if not text:
        yield
        return

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = exposition(record.snapshot()).encode()
            self.send_response(200 if self.path == "/metrics" else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(body if self.path == "/metrics" else b"")

        def log_message(self, *_: Any) -> None:
            """A scrape every few seconds is no event."""

    try:
        server = http.server.ThreadingHTTPServer(("", int(text)), Answer)
    except (ValueError, OverflowError, OSError) as error:
        raise SpecError(f"JOB_METRICS_PORT is {text}: {error}; give a free port") from None
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def exposition(status: dict[str, Any]) -> str:
    """A status as Prometheus reads it; numbers that are not known yet are left out."""
    labels = ",".join(f'{name}="{_escaped(status.get(name, ""))}"' for name in ("name", "stage", "state"))
    lines = ["# HELP vision_lora_job_info The run and where it is.", "# TYPE vision_lora_job_info gauge"]
    lines.append(f"vision_lora_job_info{{{labels}}} 1")
    started = datetime.fromisoformat(status["started"]).timestamp()
    found = {"started_timestamp_seconds": ("When this attempt began.", started)}
    found |= {name: (text, status[name]) for name, text in GAUGES.items() if name in status}
    for name, (text, value) in found.items():
        if isinstance(value, (int, float)):
            lines += [f"# HELP vision_lora_job_{name} {text}", f"# TYPE vision_lora_job_{name} gauge"]
            lines.append(f"vision_lora_job_{name} {value}")
    return "\n".join(lines) + "\n"


def _escaped(value: object) -> str:
    return str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
