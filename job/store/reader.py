"""An output for those who may only read it."""

from __future__ import annotations

from typing import Any

from job.errors import JobError
from job.store.protocol import Store


class ReadOnly:
    """A store without its ways to write: what every rank but the first has of the output."""

    def __init__(self, store: Store) -> None:
        self.url, self.list, self.read, self.read_piece = store.url, store.list, store.read, store.read_piece
        self.version, self.age, self.download = store.version, store.age, store.download

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise JobError(f"only rank 0 writes to {self.url}")

    write = upload = upload_pieces = delete = probe = abort_stale = _refuse
