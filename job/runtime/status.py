"""Reports the state of the run: log lines for the person on call, `status.json` with a heartbeat, numbers as JSONL."""

from __future__ import annotations

import functools
import hashlib
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
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from job.errors import BUG, JobError, Preempted, without_secrets
from job.layout import FAILURE_KEY, NUMBERS_KEY, STATUS_KEY
from job.runtime.limits import host_memory
from job.runtime.peaks import SAMPLE_SECONDS, Peaks
from job.runtime.periodic import repeating
from job.store import Store

log = logging.getLogger("job")

HEARTBEAT_SECONDS = 15.0
MOST_TOLD = 1000
"""Characters; a kubelet takes 4096 bytes."""
TERMINATION_LOG = Path("/dev/termination-log")
"""What the kubelet shows of an ended container, to anyone who may look at its pod."""
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
    """Log one line per event to stderr, with times in UTC."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = _Silent("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    log.handlers[:] = [handler]
    log.setLevel(level)
    log.propagate = False


class _Silent(logging.Formatter):
    """Removes credentials from log lines, including those in messages from libraries."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def on_terminal() -> bool:
    """True if stderr is a terminal, so that progress bars make sense."""
    return sys.stderr.isatty()


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def own_code(package: Path = Path(__file__).parents[1]) -> str:
    """SHA-256 over the job's own modules: another version may load, ask or compute otherwise."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def bytes_text(size: float) -> str:
    """`1536` → `1.5 kB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def peaks_text(stage: dict[str, float]) -> list[str]:
    """Format the peaks of a stage for people: `device 31.9 GB (32.5 GB reserved)`, `host 5.1 GB (3.2 GB anonymous)`, and
    scratch."""
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


MOST_SAID = 4000
"""Characters to keep of each end of a reason."""


def one_line(error: BaseException) -> str:
    """A reason on one line, for termination logs and status. A long one, which quotes a long value, keeps its beginning and
    end."""
    said = " ".join(str(error).split())
    return said if len(said) <= 2 * MOST_SAID else f"{said[:MOST_SAID]} … {said[-MOST_SAID:]}"


def last_seen(where: str) -> None:
    """Tell the kubelet where this process is, in case it is killed. An ending that was already reported stays."""
    with suppress(OSError):
        if TERMINATION_LOG.exists() and not TERMINATION_LOG.read_text().startswith("exit "):
            TERMINATION_LOG.write_text(f"no exit was reported; last seen at {now()} in {where}"[:MOST_TOLD])


def last_word(line: str) -> None:
    """Tell the kubelet how this process ends. torchrun knows less about an ending than its worker, which has reported it."""
    with suppress(OSError):
        if TERMINATION_LOG.exists() and not TERMINATION_LOG.read_text().startswith(line.partition(":")[0] + ":"):
            TERMINATION_LOG.write_text(line[:MOST_TOLD])


def ending_of(error: JobError) -> dict[str, Any]:
    state = "preempted" if error.exit_code == Preempted.exit_code else "failed"
    return {"state": state, "exit_code": error.exit_code, "reason": one_line(error)}


class Record:
    """The run's state, kept in memory and written to the store by a heartbeat and at every change of stage.

    A store that does not take the status is reported once and never stops the run.
    """

    def __init__(self, store: Store, scratch: Path, **fields: Any) -> None:
        self._store = store
        self._metrics = scratch / "metrics.jsonl"
        self.heard: Callable[[dict[str, Any]], object] | None = None  # is called with each line of numbers
        self._status: dict[str, Any] = {
            "state": "running",
            "stage": "plan",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": now(),
            **fields,
        }
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # separate: a slow store must not block a mere change of a field
        self._failing = False
        self.peaks = Peaks(scratch.parent)  # caches and features are beside this job's own folder
        self.seconds: dict[str, float] = {}
        self.stages: dict[str, dict[str, float]] = {}

    @contextmanager
    def kept(self) -> Iterator[Record]:
        """Write the status every `HEARTBEAT_SECONDS` from a thread, and finally how the block ended."""
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
            with suppress(JobError):  # its message may be a row's text, which no log may contain
                told = without_secrets("".join(traceback.format_exception(error)))
                self._store.write(FAILURE_KEY, told.encode(errors="replace"))
            raise
        finally:
            try:
                self.write(ended=now(), **ending)
            except Preempted:  # the lease is lost, which is why the run ends
                if ending["state"] != "preempted":
                    raise

    def _beat(self) -> None:
        self.peaks.walk()
        memory = host_memory()
        self.update(host_used=memory.used, host_limit=memory.limit)
        with suppress(Preempted):  # the lease is lost, which has already requested a stop
            self.write()

    def leave(self, error: JobError) -> None:
        """Write how the run ended when the process exits in the middle of the block."""
        with suppress(Preempted):
            self.write(ended=now(), **ending_of(error))

    def update(self, **fields: Any) -> None:
        """Change fields; they reach the store with the next heartbeat."""
        with self._lock:
            self._status.update(fields)

    def read(self, field: str) -> Any:
        """A field of the status; None if it was never set."""
        with self._lock:
            return self._status.get(field)

    def where(self) -> str:
        """Stage and step, for anyone looking for this process."""
        status = self.snapshot()
        return f"{status['stage']}, step {status['step']}" if "step" in status else str(status["stage"])

    def snapshot(self) -> dict[str, Any]:
        """All fields at this moment."""
        with self._lock:
            return dict(self._status)

    def write(self, **fields: Any) -> None:
        """Change fields and write the status now."""
        with self._writing:
            self.update(**fields, updated=now())
            if "rank" not in self._status and "ended" not in fields:  # rank 0 reports for all
                last_seen(f"stage {self.where()}")
            body = json.dumps(self.snapshot(), indent=1).encode()
            try:
                self._store.write(STATUS_KEY, body)
                self._failing = False
            except Preempted:  # a notice that arrived just now
                raise
            except JobError as error:
                if not self._failing:
                    log.warning("cannot write the status: %s", error)
                self._failing = True

    @contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        """Run one stage. Facts appended to the yielded list appear on its log line after its seconds and before its peaks. A
        stage that raises has no log line, but its peaks are kept."""
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
        if self.heard is not None:
            self.heard(values)

    def copy_numbers(self, folder: Path) -> None:
        """Copy the numbers so far into a checkpoint's folder, so that no kill loses those of the steps that it holds."""
        if self._metrics.exists():
            shutil.copyfile(self._metrics, folder / self._metrics.name)

    def resume_numbers(self, folder: Path | None) -> None:
        """Continue with the numbers in a checkpoint's folder; with none if the run starts anew."""
        self._metrics.unlink(missing_ok=True)
        if folder is not None and (folder / self._metrics.name).exists():
            shutil.copyfile(folder / self._metrics.name, self._metrics)

    def publish_numbers(self) -> None:
        """Send the numbers so far to `logs/`. A store that does not take them is reported and stops nothing."""
        if self._metrics.exists():
            try:
                self._store.write(NUMBERS_KEY, self._metrics.read_bytes())
            except Preempted:
                raise
            except JobError as error:
                log.warning("cannot publish logs/metrics.jsonl: %s", error)

    def read_numbers(self) -> list[dict[str, Any]]:
        if not self._metrics.exists():
            return []
        return [json.loads(line) for line in self._metrics.read_text().splitlines()]
