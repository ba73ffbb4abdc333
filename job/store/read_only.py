"""A read-only output."""

from __future__ import annotations

from typing import Any

from job.errors import JobError
from job.store.protocol import Store


class ReadOnly:
    """A store without write access: what every rank except rank 0 has of the output."""

    def __init__(self, store: Store) -> None:
        self.url, self.list, self.read, self.read_piece = store.url, store.list, store.read, store.read_piece
        self.entry, self.version, self.age, self.download = store.entry, store.version, store.age, store.download

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise JobError(f"only rank 0 writes to {self.url}")

    write = upload = upload_pieces = delete = probe = abort_stale = _refuse
