"""An S3 whose listings lag behind what is there, as those of some stores do. Everything else it answers at once."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

from job.store import Entry, Store
from tests.store.proxy import Message, answer


class Lagging:
    """`before` is for a `Proxy`: it answers each listing of the bucket of `store` as it was `seconds` ago, or when `freeze` was
    called last. It knows of keys below `prefix` alone: it lists them all at every change."""

    def __init__(self, store: Store, seconds: float | None = None, prefix: str = "") -> None:
        self.store, self.seconds, self.prefix = store, seconds, prefix
        self.frozen: list[Entry] = []
        self.changes: list[tuple[float, list[Entry]]] = []
        """When a change was asked for, and what was there until then."""

    def freeze(self) -> None:
        self.frozen = list(self.store.list(self.prefix))

    def shown(self) -> list[Entry]:
        if self.seconds is None:
            return self.frozen
        due = time.monotonic() - self.seconds
        self.changes = [change for change in self.changes if change[0] >= due]
        return self.changes[0][1] if self.changes else list(self.store.list(self.prefix))

    def before(self, request: Message) -> bytes | None:
        if self.seconds is not None and not request.first.startswith(("GET", "HEAD")):
            self.changes.append((time.monotonic(), list(self.store.list(self.prefix))))
        query = parse_qs(urlsplit(request.first.split(" ")[1]).query)
        if "list-type" not in query:
            return None
        prefix = query.get("prefix", [""])[0]
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><ETag>{escape(version)}</ETag>"
            f"<LastModified>{datetime.fromtimestamp(modified, UTC).isoformat()}</LastModified></Contents>"
            for key, size, modified, version in self.shown()
            if key.startswith(prefix)
        )
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
        return answer("200 OK", body, "x-amz-request-id: 1")
