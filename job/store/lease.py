"""One writer at a time on an output: `lease.json`, conditional puts, a heartbeat, a fencing token.

The holder rewrites the lease every third of `ttl`. Who finds a lease older than `ttl`, by the store's clock alone,
takes it over with a put on the very version it saw, so of two takers one wins. The holder measures by its own steady
clock from before its last heartbeat, so it stops believing before anyone else may begin. No two clocks are compared.

What is left to luck: a process that sleeps for longer than `ttl` between `confirm` and the put that follows it can
still put. `job.checkpoint.commit` looks again afterwards and takes its manifest back. On a store without conditional
puts two takers in the same moment may both win; the loser learns it at its next heartbeat.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from job.errors import JobError, Preempted
from job.store.protocol import Conflict, Missing, Store

log = logging.getLogger(__name__)
KEY = "lease.json"
SLACK = 2.0  # seconds: HTTP dates are whole seconds


class Lease:
    """A lease that is held. Made by `acquire`; release it, or use it as a context manager.

    `on_loss(reason)` is called once, from whichever thread learns that another has taken it over. One that ran out while
    the store was away is not lost yet: `confirm` has it back if nobody came.
    """

    def __init__(self, store: Store, holder: str, ttl: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.store = store
        self.holder = holder
        self.ttl = ttl
        self.token = 0
        self.name = secrets.token_hex(8)
        self._clock = clock
        self._on_loss: Callable[[str], None] = lambda reason: None
        self._version = ""
        self._until = -math.inf
        self._lost = ""
        self._turn = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    @property
    def lost(self) -> bool:
        """Whether it is over for good."""
        return bool(self._lost)

    def check(self) -> None:
        """Raise Preempted if the lease is lost or has run out. Asks nothing of the store."""
        if self._lost:
            raise Preempted(self._lost)
        if self._clock() >= self._until:
            raise Preempted(
                f"The lease on {self.store.url} ran out, since no heartbeat came through for {self.ttl:.0f} s."
            )

    def confirm(self) -> None:
        """Renew now: after this nobody else can hold the lease for another `ttl`. Raises Preempted when it is lost."""
        with self._turn:
            if self._lost:
                raise Preempted(self._lost)
            self._put(self._version)

    def release(self) -> None:
        """Stop the heartbeat and let the next one in at once. The token stays, so that tokens only grow."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._turn, contextlib.suppress(JobError):
            if not self._lost:
                self._lost = f"The lease on {self.store.url} was released."
                self.store.write(KEY, self._text(released=True), if_match=self._version)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _put(self, version: str | None) -> None:
        before = self._clock()
        try:
            try:
                self._version = self._write(version)
            except Conflict:
                # An earlier heartbeat that seemed to fail may have arrived: then the lease there bears our name.
                found, there = _read(self.store)
                if there.get("name") != self.name:
                    raise
                self._version = self._write(found)
        except Conflict as error:
            holder = _holder(self.store)
            self._lost = f"The lease on {self.store.url} was taken over by {holder}."
            self._on_loss(f"the loss of the lease on {self.store.url} to {holder}")
            raise Preempted(self._lost) from error
        self._until = before + self.ttl

    def _write(self, version: str | None) -> str:
        return self.store.write(KEY, self._text(released=False), if_absent=version is None, if_match=version)

    def _text(self, *, released: bool) -> bytes:
        lease = {"holder": self.holder, "name": self.name, "token": self.token, "ttl": self.ttl, "released": released}
        # The beat makes every version differ, so a version names one moment.
        return json.dumps({**lease, "beat": secrets.token_hex(4)}).encode()

    def _beat(self) -> None:
        while not self._end.wait(self.ttl / 3):
            try:
                self.confirm()
            except Preempted as error:
                log.error("%s", error)
                return
            except JobError as error:
                log.warning("The heartbeat of the lease failed and is tried again: %s", error)


def acquire(
    store: Store,
    holder: str,
    ttl: float,
    *,
    wait: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
    on_loss: Callable[[str], None] = lambda reason: None,
) -> Lease:
    """Take the lease and keep it alive from a thread. Raises Preempted (75), naming the holder, while another is live.

    `wait` is for how many seconds to see whether the holder is still alive, that is whether it renews: a job that
    follows its own killed predecessor wants about `ttl`. A holder that renews ends the wait at once.
    """
    lease = Lease(store, holder, ttl, clock)
    version, there = _read(store)
    deadline = time.monotonic() + wait
    if wait and version is not None and not _free(store, there):
        log.info("waiting up to %.0f s to see whether %s, which holds the lease, is alive", wait, _holder(store))
    while version is not None and not _free(store, there):
        if time.monotonic() >= deadline:
            raise Preempted(_busy(store, there))
        time.sleep(min(1.0, ttl / 10))
        seen, now = _read(store)
        if seen != version and not _free(store, now):
            raise Preempted(_busy(store, now))
        version, there = seen, now
    lease.token = there.get("token", 0) + 1
    try:
        lease._put(version)
    except Preempted:
        raise Preempted(_busy(store, _read(store)[1])) from None
    lease._on_loss = on_loss
    lease._thread.start()
    return lease


def _read(store: Store) -> tuple[str | None, dict[str, Any]]:
    """The version first: if the text is newer than it, the put that follows fails, as it should."""
    try:
        version = store.version(KEY)
        text = store.read(KEY)
    except Missing:
        return None, {}
    with contextlib.suppress(ValueError, TypeError, KeyError):
        there = json.loads(text)
        return version, {**there, "token": int(there["token"]), "ttl": float(there["ttl"])}
    return version, {}  # not a lease of ours: it counts as one of a minute


def _free(store: Store, there: dict[str, Any]) -> bool:
    if there.get("released"):
        return True
    try:
        return store.age(KEY) > float(there.get("ttl", 60.0)) + SLACK
    except Missing:
        return True


def _busy(store: Store, there: dict[str, Any]) -> str:
    return f"Another job writes to {store.url}: {there.get('holder', 'unknown')} holds its lease and is alive."


def _holder(store: Store) -> str:
    with contextlib.suppress(JobError):
        return str(_read(store)[1].get("holder", "nobody: it was removed"))
    return "another job"
