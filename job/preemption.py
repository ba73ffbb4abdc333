"""Signals become one `Preemption`: a flag with a deadline. Handlers set it and do nothing else.

Where nothing is worth keeping (imports, downloads, loading) the block `leave_at_once` makes the same handler raise
`Preempted` on the spot, so that a notice during a two-minute compile does not wait for it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType

from job.errors import Preempted, RankEnded, SpecError

DEFAULT_GRACE_SECONDS = 30.0
FITS = 0.8
"""Share of the grace that a save may take before we call it too slow."""
LAST_SECONDS = 1.0
"""Left of the grace when a stage that has not noticed yet (a compile, a hung store) is left as it is."""
NOTICES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
AGAIN, AGAIN_SECONDS = signal.SIGUSR2, 0.5
"""Sent to ourselves for as long as a block with nothing to keep goes on after a notice."""


class Preemption:
    """Asked to stop, or not yet.

    `grace_seconds` is the time between a notice and the kill. `end_time` (seconds since 1970) is when the scheduler ends
    the job anyway; SIGUSR1, which is sent ahead of that end, leaves all the time until then.
    """

    def __init__(self, grace_seconds: float = DEFAULT_GRACE_SECONDS, end_time: float | None = None) -> None:
        self.grace_seconds = grace_seconds
        self.end_time = end_time
        self.reason: str | None = None
        self.noticed: float | None = None
        self.code: int | None = None
        """That of another rank whose end is the reason; None for a notice."""
        self.last_words: Callable[[Preempted], None] = lambda error: None
        """Called from a thread when the deadline comes. Half of what is left then is for it."""
        self._deadline = float("inf")
        self._raising = 0
        self._interrupted = False

    @property
    def requested(self) -> bool:
        return self.reason is not None

    @property
    def remaining(self) -> float:
        """Seconds until we must be gone; infinite before any notice."""
        return self._deadline - time.monotonic()

    def request(self, reason: str, seconds: float | None = None, code: int | None = None) -> None:
        """Ask to stop within `seconds` (default: the grace), with `code` where another rank's end asks for it. The first
        reason stands, and the nearest deadline."""
        now = time.monotonic()
        self._deadline = min(self._deadline, now + (self.grace_seconds if seconds is None else seconds))
        if self.reason is None:
            self.noticed, self.code, self.reason = now, code, reason

    def check(self) -> None:
        """Raises Preempted once asked to stop."""
        if self.reason is not None:
            raise self._ending(self.reason)

    def _ending(self, reason: str) -> Preempted:
        if self.code is not None:
            return RankEnded(reason, self.code)
        return Preempted(f"stopped on {reason}; run again to continue")

    @contextmanager
    def leave_at_once(self) -> Iterator[None]:
        """A block with nothing to keep: a notice inside it, or before it, raises Preempted at once; and again and again
        where a library caught what we raised in the middle of its import, and went on, or made an error of its own of it."""
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
        ):  # it never makes a deadline nearer that another notice set
            ahead = self.end_time - time.time() if early and self.end_time is not None else 0.0
            self.request(signal.Signals(number).name, max(ahead, self.grace_seconds))
        if self._raising:
            self.check()

    @contextmanager
    def listening(self, too_late: Callable[[Preempted], None] = lambda error: None) -> Iterator[Preemption]:
        """Install the handlers; put the former ones back on exit. Main thread only.

        When the deadline comes and we are still here, `too_late(error)` is called from a thread and the process ends
        with the error's code: what is committed is whole, and the kill that follows could do no better.
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
            # Not right behind the notice: whoever cleans up after it would be torn out of that.
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


def grace_seconds(environment: Mapping[str, str]) -> float:
    """`JOB_GRACE_SECONDS`: time between notice and kill."""
    return positive(environment, "JOB_GRACE_SECONDS", DEFAULT_GRACE_SECONDS)


def positive(environment: Mapping[str, str], name: str, default: float, unit: str = "seconds") -> float:
    """A variable that holds a time, or so much of another unit. Raises SpecError for anything but a positive number."""
    text = environment.get(name, "").strip() or str(default)
    with suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise SpecError(f"{name} is {text!r}; give a number of {unit} above 0")


def end_time(environment: Mapping[str, str]) -> float | None:
    """When the scheduler will end this job, in seconds since 1970: what Slurm says in `SLURM_JOB_END_TIME`."""
    text = environment.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdigit() else None
