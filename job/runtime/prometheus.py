"""Reports a few numbers to Prometheus over HTTP, on `JOB_METRICS_PORT`.

The text is Prometheus' exposition format, version 0.0.4. It contains nothing that a status does not.
"""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from job.errors import SpecError
from job.runtime.status import Record

GAUGES = {
    "step": "Optimizer steps done.",
    "steps": "Optimizer steps planned.",
    "loss": "Loss of the last step that was logged.",
    "eval_loss": "Held-out loss when it was last measured.",
    "best_step": "Step with the lowest held-out or validation loss so far.",
    "seconds_left": "Estimated seconds until training ends.",
    "last_checkpoint": "Step of the newest checkpoint that is safe in the store.",
    "checkpoint_seconds": "How long its upload took.",
    "checkpoint_failures": "Checkpoints in a row that did not reach the store.",
    "attempt": "Attempts at this output so far.",
}


@contextmanager
def serve_metrics(record: Record, port: int | None) -> Iterator[None]:
    """Serve `/metrics` on `JOB_METRICS_PORT` while the block runs; does nothing if that is not set.

    Raises SpecError for an invalid port, or one in use.
    """
    if port is None:
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
            """Log nothing: a scrape every few seconds is not an event."""

    try:
        server = http.server.ThreadingHTTPServer(("", port), Answer)
    except (OverflowError, OSError) as error:
        raise SpecError(f"JOB_METRICS_PORT is {port}: {error}; give a free port") from None
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def exposition(status: dict[str, Any]) -> str:
    """Format a status for Prometheus, leaving out numbers that are not known yet."""
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
    measured = status.get("measured") or {}
    if measured:
        lines += [
            "# HELP vision_lora_job_metric What was measured on held-out rows.",
            "# TYPE vision_lora_job_metric gauge",
        ]
    for metric, values in measured.items():
        for when, value in values.items():
            lines.append(f'vision_lora_job_metric{{metric="{_escaped(metric)}",when="{when}"}} {value}')
    return "\n".join(lines) + "\n"


def _escaped(value: object) -> str:
    return str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
