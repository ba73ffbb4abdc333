"""What the run says: lines for the person on call, `status.json` with a heartbeat, numbers as JSONL."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from job.errors import BUG, JobError, Preempted
from job.peaks import SAMPLE_SECONDS, Peaks
from job.repeat import repeating
from job.store import Store

log = logging.getLogger("job")

HEARTBEAT_SECONDS = 15.0
STATUS_KEY = "status.json"
METRICS_KEY = "logs/metrics.jsonl"
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "unsloth",
    "unsloth-zoo",
    "torchvision",
    "pillow",
    "bitsandbytes",
    "vision-lora-job",
)


def start_logging(level: int = logging.INFO) -> None:
    """One line an event on stderr, times in UTC."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    log.handlers[:] = [handler]
    log.setLevel(level)
    log.propagate = False


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def watched() -> bool:
    """True when a terminal looks at stderr, so that progress bars make sense."""
    return sys.stderr.isatty()


def versions() -> dict[str, str]:
    """Installed versions of what decides a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def bytes_text(size: float) -> str:
    """`1536` → `1.5 kB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def peaks_text(stage: dict[str, float]) -> list[str]:
    """The peaks of a stage for people: `device 31.9 GB (32.5 GB reserved)`, `host 5.1 GB (3.2 GB anonymous)`, and scratch."""
    said = []
    for name, peak, inner, word in (
        ("device", "device_peak", "device_reserved", "reserved"),
        ("host", "host_peak", "host_anonymous", "anonymous"),
        ("scratch", "scratch", "", ""),
    ):
        if peak in stage:
            said.append(f"{name} {bytes_text(stage[peak])}")
            said[-1] += f" ({bytes_text(stage[inner])} {word})" if inner in stage else ""
    return said


def one_line(error: BaseException) -> str:
    """A reason on one line, for termination logs and status."""
    return " ".join(str(error).split())


def ending_of(error: JobError) -> dict[str, Any]:
    state = "preempted" if error.exit_code == Preempted.exit_code else "failed"
    return {"state": state, "exit_code": error.exit_code, "reason": one_line(error)}


class Record:
    """The run's state, kept in memory, written to the store by a heartbeat and at every change of stage.

    A store that does not take the status is reported once and never stops the run.
    """

    def __init__(self, store: Store, scratch: Path, **fields: Any) -> None:
        self._store = store
        self._metrics = scratch / "metrics.jsonl"
        self._status: dict[str, Any] = {
            "state": "running",
            "stage": "plan",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": now(),
            **fields,
        }
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # of its own: a slow store must not hold up who only changes a field
        self._failing = False
        self.peaks = Peaks(scratch.parent)  # caches and features lie beside this job's own folder
        self.seconds: dict[str, float] = {}
        self.stages: dict[str, dict[str, float]] = {}

    @contextmanager
    def kept(self) -> Iterator[Record]:
        """Write the status every `HEARTBEAT_SECONDS` from a thread of its own, and how the block ended at the end."""
        ending: dict[str, Any] = {"state": "published", "exit_code": 0, "reason": "published"}
        try:
            with (
                repeating(self._beat, HEARTBEAT_SECONDS, "heartbeat"),
                repeating(self.peaks.sample, SAMPLE_SECONDS, "host memory"),
            ):
                yield self
        except JobError as error:
            ending = ending_of(error)
            raise
        except BaseException as error:
            ending = {"state": "failed", "exit_code": BUG, "reason": f"a bug: {type(error).__name__}"}
            raise
        finally:
            self.write(ended=now(), **ending)

    def _beat(self) -> None:
        self.peaks.walk()
        self.write()

    def leave(self, error: JobError) -> None:
        """Write how it ended, when the process goes in the middle of the block."""
        self.write(ended=now(), **ending_of(error))

    def update(self, **fields: Any) -> None:
        """Change fields; they reach the store with the next beat."""
        with self._lock:
            self._status.update(fields)

    def read(self, field: str) -> Any:
        """A field of the status; None when it was never set."""
        with self._lock:
            return self._status.get(field)

    def where(self) -> str:
        """Stage and step, for whoever looks for this process."""
        status = self.snapshot()
        return f"{status['stage']}, step {status['step']}" if "step" in status else str(status["stage"])

    def snapshot(self) -> dict[str, Any]:
        """All fields as they are now."""
        with self._lock:
            return dict(self._status)

    def write(self, **fields: Any) -> None:
        """Change fields and write the status now."""
        with self._writing:
            self.update(**fields, updated=now())
            body = json.dumps(self.snapshot(), indent=1).encode()
            try:
                self._store.write(STATUS_KEY, body)
                self._failing = False
            except Preempted:  # a notice that came just now
                raise
            except JobError as error:
                if not self._failing:
                    log.warning("status is not written: %s", error)
                self._failing = True

    @contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        """One stage. Facts appended to the list it yields end up on its log line, behind the seconds it took; its peaks
        follow them. A stage that raises has no log line, and its peaks are kept all the same."""
        started, facts = time.monotonic(), list[str]()
        self.peaks.begin()
        self.write(stage=name)
        try:
            yield facts
        finally:
            seconds = round(time.monotonic() - started, 2)
            self.stages[name] = {"seconds": seconds, **self.peaks.end()}
            self.update(stages=dict(self.stages))
        self.seconds[name] = seconds
        facts += peaks_text(self.stages[name])
        log.info("%s: %.1f s%s", name, seconds, "; " + ", ".join(facts) if facts else "")

    def numbers(self, **values: Any) -> None:
        """Append one line to `logs/metrics.jsonl` (local until `publish_numbers`)."""
        with self._metrics.open("a") as file:
            file.write(json.dumps({"time": now(), **values}) + "\n")

    def copy_numbers(self, folder: Path) -> None:
        """Put the numbers so far into a checkpoint's folder, so that no kill loses those of steps that it holds."""
        if self._metrics.exists():
            shutil.copyfile(self._metrics, folder / self._metrics.name)

    def resume_numbers(self, folder: Path | None) -> None:
        """Take up the numbers that a checkpoint's folder holds; none when the run begins anew."""
        self._metrics.unlink(missing_ok=True)
        if folder is not None and (folder / self._metrics.name).exists():
            shutil.copyfile(folder / self._metrics.name, self._metrics)

    def publish_numbers(self) -> None:
        """Send the numbers so far to `logs/`. A store that does not take them is reported and stops nothing."""
        if self._metrics.exists():
            try:
                self._store.write(METRICS_KEY, self._metrics.read_bytes())
            except Preempted:
                raise
            except JobError as error:
                log.warning("numbers are not published: %s", error)

    def read_numbers(self) -> list[dict[str, Any]]:
        if not self._metrics.exists():
            return []
        return [json.loads(line) for line in self._metrics.read_text().splitlines()]
