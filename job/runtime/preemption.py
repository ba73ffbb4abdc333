"""Turns signals into one `Preemption`: a flag with a deadline. Handlers set it and do nothing else.

Where nothing is worth keeping (imports, downloads, loading), the block `leave_at_once` makes the same handler raise `Preempted`
immediately, so that a notice during a two-minute compile does not wait for it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from job.config.environment import Environment
from job.errors import Preempted, RankEnded, ScratchFilled

FITS = 0.8
"""Share of the grace period that a save may take before it counts as too slow."""
LAST_SECONDS = 1.0
"""Seconds of grace left when a stage that has not reacted yet (a compile, a hung store) is abandoned."""
NOTICES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
AGAIN, AGAIN_SECONDS = signal.SIGUSR2, 0.5
"""Sent to this process while a block with nothing to keep goes on after a notice."""


class Preemption:
    """State of a stop request.

    `grace_seconds` is the time between a notice and the kill. `end_time` (seconds since 1970) is when the scheduler ends the job
    anyway; SIGUSR1, which is sent ahead of that end, leaves all the time until then.
    """

    def __init__(self, grace_seconds: float = Environment.grace_seconds, end_time: float | None = None) -> None:
        self.grace_seconds = grace_seconds
        self._end = None if end_time is None else time.monotonic() + end_time - time.time()
        self.reason: str | None = None
        self.noticed: float | None = None
        self.code: int | None = None
        """Exit code of the rank whose end is the reason, or for filled scratch; None for a preemption notice."""
        self.filled = False
        self.over: Callable[[], str | None] = lambda: None
        """Explains why scratch is over its limit now, if it is. Checked when a notice ends the job, since that may be the
        cause."""
        self.last_words: Callable[[Preempted], None] = lambda error: None
        """Called from a thread at the deadline, with half of the time that is left then."""
        self._deadline = float("inf")
        self._raising = 0
        self._interrupted = False

    @property
    def requested(self) -> bool:
        return self.reason is not None

    @property
    def remaining(self) -> float:
        """Seconds until the process must be gone; infinite before any notice."""
        return self._deadline - time.monotonic()

    def request(self, reason: str, seconds: float | None = None, code: int | None = None) -> None:
        """Request a stop within `seconds` (default: the grace period), with `code` if another rank's end requires it. The
        first reason and the nearest deadline count."""
        now = time.monotonic()
        self._deadline = min(self._deadline, now + (self.grace_seconds if seconds is None else seconds))
        if self.reason is None:
            self.noticed, self.code, self.reason = now, code, reason

    def fill(self, reason: str) -> None:
        """Request a stop because scratch has grown to its limit, unless another reason came first."""
        if self.reason is None:
            self.filled = True
            self.request(reason, code=ScratchFilled.exit_code)

    def check(self) -> None:
        """Raises Preempted after a stop request."""
        if self.reason is not None:
            raise self._ending(self.reason)

    def _ending(self, reason: str) -> Preempted:
        if self.code is None and (why := self.over()):
            self.filled, self.code, reason = True, ScratchFilled.exit_code, why
        if self.filled:
            return ScratchFilled(reason)
        if self.code is not None:
            return RankEnded(reason, self.code)
        return Preempted(f"stopped on {reason}; run again to continue")

    @contextmanager
    def leave_at_once(self) -> Iterator[None]:
        """A block with nothing to keep: a notice inside it, or before it, raises Preempted at once. It is raised again while
        the block goes on, because a library may catch it in the middle of an import and continue, or turn it into its own
        error."""
        self._raising += 1
        try:
            self.check()
            yield
            self.check()
        except Exception as error:
            if isinstance(error, Preempted) or self.reason is None:
                raise
            raise self._ending(self.reason) from error
        finally:
            self._raising -= 1

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            os._exit(Preempted.exit_code)  # a person who presses twice means it
        self._interrupted |= number == signal.SIGINT
        early = number == signal.SIGUSR1
        if number != AGAIN and not (
            early and self.requested
        ):  # it never brings forward a deadline that another notice set
            ahead = self._end - time.monotonic() if early and self._end is not None else 0.0
            self.request(signal.Signals(number).name, max(ahead, self.grace_seconds))
        if self._raising:
            self.check()

    @contextmanager
    def listening(self, too_late: Callable[[Preempted], None] = lambda error: None) -> Iterator[Preemption]:
        """Install the handlers and restore the former ones on exit. Main thread only.

        If the process is still running at the deadline, `too_late(error)` is called from a thread and the process exits with the
        error's code: what is committed is whole, and the kill that follows could do no better.
        """
        former = {number: signal.signal(number, self._handle) for number in (*NOTICES, AGAIN)}
        ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(ended, too_late), name="deadline", daemon=True)
        watch.start()
        try:
            yield self
        finally:
            ended.set()
            watch.join()
            for number, handler in former.items():
                signal.signal(number, handler)

    def _watch(self, ended: threading.Event, too_late: Callable[[Preempted], None]) -> None:
        main, told = threading.main_thread().ident, 0.0
        while not ended.wait(0.1):
            # Not right after the notice, because that would interrupt cleanup.
            if self._raising and self.noticed and main and time.monotonic() > max(told, self.noticed) + AGAIN_SECONDS:
                told = time.monotonic()
                signal.pthread_kill(main, AGAIN)
            if self.remaining < min(LAST_SECONDS, self.grace_seconds / 4):
                error = self._ending(f"{self.reason}, in the middle of a stage")
                speaker = threading.Thread(target=self.last_words, args=(error,), daemon=True)
                speaker.start()
                speaker.join(max(self.remaining, 0) / 2)
                too_late(error)
                os._exit(error.exit_code)


def end_time(environment: Mapping[str, str]) -> float | None:
    """When the scheduler will end this job, in seconds since 1970, according to Slurm's `SLURM_JOB_END_TIME`."""
    text = environment.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdigit() else None
