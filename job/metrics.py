"""What the run says to Prometheus: a few numbers over HTTP, where `JOB_METRICS_PORT` asks for them, or in the file that
`JOB_METRICS_FILE` names, for the textfile collector of a node exporter.

The text is Prometheus' exposition format, version 0.0.4. There is nothing in it that a status does not hold.
"""

from __future__ import annotations

import http.server
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from job.errors import SpecError
from job.record import Record
from job.repeat import repeating

log = logging.getLogger("job")

FILE_SECONDS = 15.0
GAUGES = {
    "step": "Optimizer steps done.",
    "steps": "Optimizer steps planned.",
    "loss": "Loss of the last step that was logged.",
    "eval_loss": "Held-out loss when it was last measured.",
    "best_step": "Step with the lowest held-out loss so far.",
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


@contextmanager
def writing(record: Record, environment: Mapping[str, str]) -> Iterator[None]:
    """Write `JOB_METRICS_FILE` (`…/metrics.prom`) every `FILE_SECONDS` while the block runs; nothing where it is not set.

    Raises SpecError where it cannot be written. The file appears by a rename, so that nobody reads half of it.
    """
    name = environment.get("JOB_METRICS_FILE", "").strip()
    if not name:
        yield
        return
    path = Path(name)

    def write() -> None:
        made = path.with_name(f".{path.name}.{os.getpid()}")
        made.write_text(exposition(record.snapshot()))
        made.replace(path)

    def write_again() -> None:
        with suppress(OSError):  # a full disk here is no reason to stop training
            write()

    try:
        write()
    except OSError as error:
        raise SpecError(f"JOB_METRICS_FILE: {path}: {error.strerror}; name a file in a folder that is there") from None
    try:
        with repeating(write_again, FILE_SECONDS, "metrics file"):
            yield
    finally:
        write_again()


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
