"""Uploads checkpoints off the training thread: at most one in flight, the newest wins, failures are reported, never raised."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from job.checkpoint.commit import commit, prune
from job.checkpoint.manifest import Manifest
from job.errors import JobError
from job.store import Store
from job.store.lease import Lease

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """A private folder with the state after `step`. The uploader removes it once a checkpoint as new is committed."""

    folder: Path
    step: int
    epoch: float
    extra: dict[str, Any]
    written: Future[None] | None


class Uploader:
    """A thread that commits snapshots and prunes old checkpoints.

    It calls `on_failure(step, error, failures in a row)` and `on_commit(manifest)`. A failed snapshot is tried again, after a
    pause that grows up to a minute, until a newer one replaces it.
    """

    def __init__(
        self,
        store: Store,
        *,
        spec_digest: str,
        attempt: int,
        lease: Lease | None,
        keep: int,
        versions: dict[str, str] | None = None,
        on_failure: Callable[[int, JobError, int], None] | None = None,
        on_commit: Callable[[Manifest], None] | None = None,
        loud_after: int = 3,
        first_pause: float = 2.0,
    ) -> None:
        self.store = store
        self.spec_digest = spec_digest
        self.attempt = attempt
        self.lease = lease
        self.keep = keep
        self.versions = versions
        self.on_failure = on_failure
        self.on_commit = on_commit
        self.loud_after = loud_after
        self.first_pause = first_pause
        self.failures = 0
        self.error: JobError | None = None
        """The last failure, until a commit succeeds."""
        self._waiting: Snapshot | None = None
        self._in_flight: Snapshot | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)
        self._thread.start()

    def submit(
        self,
        folder: Path,
        step: int,
        *,
        epoch: float,
        extra: dict[str, Any] | None = None,
        written: Future[None] | None = None,
    ) -> None:
        """Hand over a snapshot and return at once. It replaces a snapshot that is still waiting.

        The uploader's thread first waits for `written`, so a folder that is still being filled may be handed over.
        """
        with self._changed:
            replaced, self._waiting = self._waiting, Snapshot(folder, step, epoch, extra or {}, written)
            self._changed.notify_all()
        if replaced is not None:
            log.info("The checkpoint of step %d is skipped for the newer one of step %d.", replaced.step, step)
            # Also off this thread: removing a gigabyte takes time.
            threading.Thread(target=shutil.rmtree, args=(replaced.folder, True), daemon=True).start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until everything handed over is committed. False if time ran out or the lease was lost."""
        with self._changed:
            self._changed.wait_for(lambda: self._idle() or self.lost, timeout)
            return self._idle()

    def try_again(self) -> None:
        """Forget earlier failures: what failed is tried now, and pauses grow from the first one again."""
        with self._changed:
            self.failures = 0
            self._changed.notify_all()

    @property
    def lost(self) -> bool:
        """Whether the lease is lost, so that nothing will be committed any more."""
        return self.error is not None and self.lease is not None and self.lease.lost

    def close(self) -> None:
        """Finish the upload in flight, retry nothing, and stop."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Uploader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:  # a job that leaves in a hurry has waited as long as it could
            self._closed = True

    def _idle(self) -> bool:
        return self._waiting is None and self._in_flight is None

    def _run(self) -> None:
        while (snapshot := self._next()) is not None:
            committed = self._commit(snapshot)
            with self._changed:
                self._in_flight = None
                if not committed:
                    self._keep(snapshot)
                self._changed.notify_all()
                if self.lost:
                    return
                if not committed:
                    # Retry after a pause, at once if a newer snapshot arrives, not at all when closing.
                    pause = min(self.first_pause * 2 ** (self.failures - 1), 60.0)
                    self._changed.wait_for(partial(self._newer_than, snapshot), pause)

    def _next(self) -> Snapshot | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._closed)
            if self._closed and self.failures:
                return None
            self._in_flight, self._waiting = self._waiting, None
            return self._in_flight

    def _keep(self, snapshot: Snapshot) -> None:
        """Keep one local copy: this one, unless a newer one is already waiting."""
        if self._waiting is None:
            self._waiting = snapshot
        else:
            shutil.rmtree(snapshot.folder, ignore_errors=True)

    def _newer_than(self, snapshot: Snapshot) -> bool:
        return self._closed or self._waiting is not snapshot or not self.failures

    def _commit(self, snapshot: Snapshot) -> bool:
        try:
            if snapshot.written is not None:
                snapshot.written.result()
            manifest = commit(
                self.store,
                snapshot.folder,
                step=snapshot.step,
                epoch=snapshot.epoch,
                spec_digest=self.spec_digest,
                attempt=self.attempt,
                extra=snapshot.extra,
                versions=self.versions,
                lease=self.lease,
            )
        except Exception as error:
            self._failed(
                snapshot, error if isinstance(error, JobError) else JobError(f"{type(error).__name__}: {error}")
            )
            return False
        self.failures = 0
        self.error = None
        shutil.rmtree(snapshot.folder, ignore_errors=True)
        try:
            if self.on_commit:
                self.on_commit(manifest)
            if self.lease:
                self.lease.check()  # the next writer decides what it needs
            prune(self.store, keep=self.keep, verified=snapshot.step)
        except Exception as error:  # whatever it is, the thread continues: training waits for it at the end
            log.warning("Step %d is committed, but what follows a commit failed: %s", snapshot.step, error)
        return True

    def _failed(self, snapshot: Snapshot, error: JobError) -> None:
        self.failures += 1
        self.error = error
        loud = self.failures >= self.loud_after or self.lost
        log.log(
            logging.ERROR if loud else logging.WARNING,
            "The checkpoint of step %d could not be uploaded (%d in a row); it stays in %s until another attempt begins. %s",
            snapshot.step,
            self.failures,
            snapshot.folder,
            error,
        )
        if self.on_failure:
            self.on_failure(snapshot.step, error, self.failures)
