"""Wraps a store so that it overwrites and deletes only what jobs recorded there as their own.

`written.json` names every object that jobs wrote. A key is recorded before anything is written under it, so a killed job leaves
nothing behind that the next one would not know. A file that somebody else put there is never touched: a write to its key is
refused, and a deletion skips it. The record itself is written with conditional puts, so a writer that lost its lease cannot
replace it with an older one. One gap remains: a file that appears under a recorded key after the job died, and before the job had
written there itself, is taken for the job's.

Under a lease (`hold`) every write and deletion is fenced: the lease is checked first, and the condition is the version that this
attempt knows from its listing under the lease or from its own last write. A Conflict then means that a former holder woke up
late, or that we are one: the lease is confirmed, and its holder overwrites what came late.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from job.errors import JobError, Preempted, SpecError
from job.layout import WRITTEN_KEY
from job.store.lease import Lease
from job.store.protocol import Capabilities, Conflict, Digest, Entry, Missing, Pieces, Store

log = logging.getLogger(__name__)
PROGRAM = "vision-lora-job"
BUNDLES = "vision-lora-job prefetch"
Sent = TypeVar("Sent", str, Digest)


class OwnedStore:
    """`inner` with a record of what was written through this store. Call `read_record` first; a write without it reads the
    record. The record of another `program` counts as somebody else's file: outputs are not bundles, and bundles are not
    outputs."""

    def __init__(self, inner: Store, program: str = PROGRAM) -> None:
        self.inner, self.url, self.program = inner, inner.url, program
        self.entry, self.read, self.read_piece = inner.entry, inner.read, inner.read_piece
        self.version, self.age, self.download, self.probe = inner.version, inner.age, inner.download, inner.probe
        self._writer = secrets.token_hex(8)
        self._keys: frozenset[str] | None = None
        self._version: str | None = None
        self._turn = threading.Lock()
        self._lease: Lease | None = None
        self._can: Capabilities | None = None
        self._versions: dict[str, str] = {}
        self._deleted = set[str]()
        self._former: frozenset[str] = frozenset()

    def hold(self, lease: Lease, can: Capabilities) -> None:
        """Write and delete only under this lease, as far as the store can (`probe`). Call `take_up` next."""
        self._lease, self._can = lease, can

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """List what is there. A listing may lag: recorded keys that it lacks are looked up one by one, and keys deleted
        through this store are left out."""
        mine = self._mine()
        there = {entry.key: entry for entry in self.inner.list(prefix) if entry.key not in self._deleted - mine}
        for key in mine - there.keys():
            if key.startswith(prefix):
                with suppress(Missing):
                    there[key] = self.inner.entry(key)
        yield from sorted(there.values())

    def read_record(self) -> frozenset[str] | None:
        """Read the record afresh and return the keys that jobs wrote here; None if no job recorded any. Keys of deleted
        objects may be among them until `take_up`."""
        try:
            version, there = self.inner.version(WRITTEN_KEY), self._there()
        except Missing:
            version, there = None, None
        keys = there.get("files") if there is not None else None
        self._version = version if keys is not None else None
        self._keys = frozenset(keys or ())
        return None if keys is None else self._keys

    def take_up(self) -> frozenset[str]:
        """Begin to write under the lease: abort what dead writers left half-written, and forget what is gone. Returns the keys
        that jobs wrote and that still exist."""
        keys = self._former = self.read_record() or frozenset()
        try:
            self.inner.abort_stale(keys, 0.0)
        except Preempted:
            raise
        except JobError as error:
            log.warning("Unfinished uploads cannot be removed. %s", error)
        self._versions = {entry.key: entry.version for entry in self.list()}
        left = keys & self._versions.keys()
        if left != keys:
            with self._turn:
                self._save(left)
        return left

    def claim(self, keys: Iterable[str]) -> None:
        """Record keys before anything is written under them. Raises SpecError for a key that holds somebody else's file."""
        wanted = frozenset(keys)
        if wanted <= self._mine():
            return
        with self._turn:
            new = sorted(wanted - self._mine())
            for key in new:
                with suppress(Missing):
                    self.inner.entry(key)
                    if self._came_late(key):
                        continue
                    raise SpecError(
                        f"{self.url} holds {key}, which no job wrote there, and this job would overwrite it; move it away, "
                        "and run again"
                    )
            if new:
                self._save(self._mine() | wanted)

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        return self._fenced(key, partial(self.inner.write, key, data), if_absent, if_match)

    def upload(self, path: Path, key: str, *, if_absent: bool = False, if_match: str | None = None) -> Digest:
        return self._fenced(key, partial(self.inner.upload, path, key), if_absent, if_match)

    def upload_pieces(
        self, make: Pieces, size: int, key: str, *, if_absent: bool = False, if_match: str | None = None
    ) -> Digest:
        return self._fenced(key, partial(self.inner.upload_pieces, make, size, key), if_absent, if_match)

    def delete(self, keys: Iterable[str], *, if_match: Mapping[str, str] | None = None) -> None:
        """Delete the keys that are recorded. The others stay, whatever they are."""
        mine = [key for key in keys if key in self._mine()]
        if not mine:
            return
        if self._lease is None:
            self.inner.delete(mine)
        else:
            known = {key: self._versions[key] for key in mine if key in self._versions} | dict(if_match or {})
            self._delete_fenced(self._lease, mine, known)
        self._deleted |= set(mine)
        for key in mine:
            self._versions.pop(key, None)
        with self._turn:
            self._save(self._mine() - set(mine))

    def _delete_fenced(self, lease: Lease, keys: Collection[str], known: dict[str, str]) -> None:
        if self._can is not None and self._can.deletes:
            lease.assure()
        else:
            lease.confirm()
        try:
            self.inner.delete(keys, if_match=known)
        except Conflict:
            lease.confirm()
            self.inner.delete(keys)

    def _fenced(self, key: str, send: Callable[..., Sent], if_absent: bool, if_match: str | None) -> Sent:
        """Send on the given condition, else on the known version; once more if the lease is held and somebody else wrote
        there."""
        self.claim([key])
        self._assure()
        given = if_absent or if_match is not None
        try:
            sent = send(if_absent=if_absent, if_match=if_match) if given else send(**self._condition(key))
        except Conflict:
            if given or self._lease is None:
                raise
            self._versions.pop(key, None)
            with suppress(Missing):
                self._versions[key] = self.inner.version(key)
            self._lease.confirm()  # after the look: what it saw was written before
            log.warning("%s in %s was written by a former holder of the lease, and is overwritten", key, self.url)
            sent = send(**self._condition(key))
        self._versions[key] = sent if isinstance(sent, str) else sent.version
        return sent

    def _condition(self, key: str) -> dict[str, Any]:
        if self._lease is None or self._can is None or not self._can.conditional:
            return {}
        return {"if_match": self._versions[key]} if key in self._versions else {"if_absent": True}

    def _assure(self) -> None:
        if self._lease is not None:
            self._lease.assure()

    def abort_stale(self, keys: Collection[str], older_than: float) -> int:
        return self.inner.abort_stale(self._mine() & set(keys), older_than)

    def _came_late(self, key: str) -> bool:
        """Return whether a former holder recorded this key, and so may write it yet. Raises Preempted if we are a former
        holder."""
        if self._lease is None:
            return False
        self._lease.confirm()
        return key in self._former or key in (self._there() or {}).get("files", ())

    def _mine(self) -> frozenset[str]:
        if self._keys is None:
            self.read_record()
        assert self._keys is not None
        return self._keys

    def _there(self) -> dict[str, Any] | None:
        """Read the record; None if the file of that name is not ours."""
        try:
            there = json.loads(self.inner.read(WRITTEN_KEY))
        except ValueError:
            return None
        ours = isinstance(there, dict) and there.get("program") == self.program and isinstance(there.get("files"), list)
        return there if ours else None

    def _save(self, keys: frozenset[str]) -> None:
        """Write the record. Raises Conflict if another writer changed it since it was read."""
        self._assure()
        try:
            version = self.inner.write(
                WRITTEN_KEY, self._text(keys), if_absent=self._version is None, if_match=self._version
            )
        except Conflict:
            # An earlier write of ours may have arrived although it seemed to fail, or a notice interrupted it.
            found, there = self.inner.version(WRITTEN_KEY), self._there() or {}
            if there.get("writer") != self._writer:
                if self._lease is None:
                    raise
                self._lease.confirm()
                keys |= frozenset(there.get("files", ()))  # of a former holder, which may still write them
            version = self.inner.write(WRITTEN_KEY, self._text(keys), if_match=found)
        self._version, self._keys = version, keys

    def _text(self, keys: frozenset[str]) -> bytes:
        return json.dumps({"program": self.program, "writer": self._writer, "files": sorted(keys)}, indent=0).encode()


def take_back(store: Store, key: str, version: str) -> None:
    """Delete an object written before the lease turned out to be lost, if it is unchanged. Does not check the lease."""
    inner = store.inner if isinstance(store, OwnedStore) else store
    with suppress(Missing, Conflict):
        if inner.version(key) == version:
            inner.delete([key], if_match={key: version})
