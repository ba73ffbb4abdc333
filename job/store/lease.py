"""Allows one writer at a time on an output: `lease.json`, conditional puts, a heartbeat, a fencing token.

The holder rewrites the lease every third of `ttl`. A process that finds a lease older than `ttl` by the store's clock, or sees it
unchanged for that long by its own, takes it over with a put on exactly the version that it saw, so only one of two takers wins.
The holder measures by its own steady clock from before its last heartbeat, so it stops relying on the lease before anyone else
may begin. No two clocks are compared.

`job.store.owned` checks the lease before each write and deletion, and makes both conditional on the version that the holder
knows. A holder that froze after the check is too late for what its successor has written, and learns that it lost the lease.

Two gaps remain. On a store without conditional puts, a process that sleeps for longer than `ttl` between the check and its put
can still put, and two takers at the same moment may both win; the loser learns it at its next heartbeat. The same applies to
deletions where they cannot be conditional.
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
from job.layout import LEASE_KEY
from job.store.protocol import Conflict, Missing, Store

log = logging.getLogger(__name__)
SLACK = 2.0  # seconds: HTTP dates are whole seconds


def steady() -> float:
    """Seconds by a clock that nobody sets and that keeps running while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """A held lease. Made by `acquire`; release it, or use it as a context manager.

    `on_loss(reason)` is called once, from whichever thread learns that another process took the lease over. A lease that expired
    while the store was unreachable is not lost yet: `confirm` regains it if nobody took it.
    """

    def __init__(self, store: Store, holder: str, ttl: float, clock: Callable[[], float] = steady) -> None:
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
        """Whether the lease is lost for good."""
        return bool(self._lost)

    def check(self) -> None:
        """Raise Preempted if the lease is lost or expired. Does not contact the store."""
        if self._lost:
            raise Preempted(self._lost)
        if self._clock() >= self._until:
            raise Preempted(f"The lease on {self.store.url} expired: no heartbeat succeeded for {self.ttl:.0f} s.")

    def assure(self) -> None:
        """Raise Preempted if the lease is lost. Contacts the store if its last answer is older than half of `ttl`."""
        if self._lost:
            raise Preempted(self._lost)
        if self._clock() >= self._until - self.ttl / 2:
            self.confirm()

    def confirm(self) -> None:
        """Renew now: nobody else can then hold the lease for another `ttl`. Raises Preempted if it is lost."""
        with self._turn:
            if self._lost:
                raise Preempted(self._lost)
            self._put(self._version)

    def release(self) -> None:
        """Stop the heartbeat and let the next holder in at once. The token stays, so tokens only grow."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._turn, contextlib.suppress(JobError):
            if not self._lost:
                self._lost = f"The lease on {self.store.url} was released."
                self.store.write(LEASE_KEY, self._text(released=True), if_match=self._version)

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
                # An earlier heartbeat that seemed to fail may have arrived; the stored lease then has our name.
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
        return self.store.write(LEASE_KEY, self._text(released=False), if_absent=version is None, if_match=version)

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
                log.warning("The heartbeat of the lease failed and will be retried: %s", error)


def acquire(
    store: Store,
    holder: str,
    ttl: float,
    *,
    wait: float = 0.0,
    clock: Callable[[], float] = steady,
    on_loss: Callable[[str], None] = lambda reason: None,
) -> Lease:
    """Acquire the lease and renew it from a thread. Raises Preempted (75), naming the holder, while another one is alive.

    `wait` is for how many seconds to watch whether the holder is alive, that is, renews: a job that follows its own killed
    predecessor needs about `ttl`. A holder that renews ends the wait at once.
    """
    lease = Lease(store, holder, ttl, clock)
    version, there = _read(store)
    first_seen = clock()
    deadline = first_seen + wait
    if wait and version is not None and not _free(store, there):
        log.info("waiting up to %.0f s to see whether %s, which holds the lease, is alive", wait, _holder(store))
    # The store's clock may have been set back, which makes the age useless; that nobody renews is enough.
    while version is not None and not _free(store, there) and clock() - first_seen <= _term(there):
        if clock() >= deadline:
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
    """Read the version first: if the text is newer, the put that follows fails, as it should."""
    try:
        version = store.version(LEASE_KEY)
        text = store.read(LEASE_KEY)
    except Missing:
        return None, {}
    with contextlib.suppress(ValueError, TypeError, KeyError):
        there = json.loads(text)
        return version, {**there, "token": int(there["token"]), "ttl": float(there["ttl"])}
    return version, {}  # not one of our leases: treated as one of a minute


def is_lease(data: bytes) -> bool:
    """Return whether an object under the lease's key is a lease, not somebody else's file."""
    with contextlib.suppress(ValueError):
        there = json.loads(data)
        return isinstance(there, dict) and {"holder", "token", "ttl"} <= there.keys()
    return False


def _free(store: Store, there: dict[str, Any]) -> bool:
    if there.get("released"):
        return True
    try:
        return store.age(LEASE_KEY) > _term(there)
    except Missing:
        return True


def _term(there: dict[str, Any]) -> float:
    """Seconds without a heartbeat after which a lease has expired."""
    return float(there.get("ttl", 60.0)) + SLACK


def _busy(store: Store, there: dict[str, Any]) -> str:
    return f"Another job writes to {store.url}: {there.get('holder', 'unknown')} holds its lease and is alive."


def _holder(store: Store) -> str:
    with contextlib.suppress(JobError):
        return str(_read(store)[1].get("holder", "nobody (it was deleted)"))
    return "another job"
