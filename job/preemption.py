"""Signals become one `Preemption`: a flag with a deadline. Handlers set it and do nothing else.

Where nothing is worth keeping (imports, downloads, loading) the block `leave_at_once` makes the same handler raise
`Preempted` on the spot, so that a notice during a two-minute compile does not wait for it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from job.errors import Preempted

DEFAULT_GRACE_SECONDS = 30.0
NOTICES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preemption:
    """Asked to stop, or not yet. `deadline` is on the monotonic clock, in seconds."""

    def __init__(self, grace_seconds: float = DEFAULT_GRACE_SECONDS) -> None:
        self.grace_seconds = grace_seconds
        self.reason: str | None = None
        self.noticed: float | None = None
        self._raising = 0

    @property
    def requested(self) -> bool:
        return self.reason is not None

    @property
    def remaining(self) -> float:
        """Seconds until we must be gone; infinite before any notice."""
        return float("inf") if self.noticed is None else self.noticed + self.grace_seconds - time.monotonic()

    def request(self, reason: str) -> None:
        """Ask to stop. The first reason stands."""
        if self.reason is None:
            self.noticed, self.reason = time.monotonic(), reason

    def check(self) -> None:
        """Raises Preempted once asked to stop."""
        if self.reason is not None:
            raise Preempted(f"stopped on {self.reason}; run again to continue")

    @contextmanager
    def leave_at_once(self) -> Iterator[None]:
        """A block with nothing to keep: a notice inside it, or before it, raises Preempted at once."""
        self._raising += 1
        try:
            self.check()
            yield
        finally:
            self._raising -= 1

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            os._exit(Preempted.exit_code)  # a person who presses twice means it
        self.request(signal.Signals(number).name)
        if self._raising:
            self.check()

    @contextmanager
    def listening(self) -> Iterator[Preemption]:
        """Install the handlers; put the former ones back on exit. Main thread only."""
        former = {number: signal.signal(number, self._handle) for number in NOTICES}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def grace_seconds(environment: Mapping[str, str]) -> float:
    """`JOB_GRACE_SECONDS`: time between notice and kill. Raises ValueError for anything but a positive number."""
    text = environment.get("JOB_GRACE_SECONDS", "").strip()
    if not text:
        return DEFAULT_GRACE_SECONDS
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value
