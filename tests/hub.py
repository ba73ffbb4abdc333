"""A hub for tests: an HTTP server that speaks as much of the Hugging Face Hub's protocol as models and data sets need."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

PLACE = re.compile(
    r"/(?:api/)?(?:(models|datasets)/)?([\w.-]+/[\w.-]+)(?:/(revision|tree|resolve|paths-info)/([^/]+)/?(.*))?"
)


@dataclass
class Hub:
    """`repos` are folders by (kind, name); a gated one wants `token`. `down` answers 503 to all. `asked` is what was asked."""

    url: str = ""
    repos: dict[tuple[str, str], Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str = "hf_right"
    down: bool = False
    asked: list[str] = field(default_factory=list)

    def add(self, kind: str, name: str, folder: Path, *, gated: bool = False) -> str:
        """Publish a folder. Returns the commit."""
        self.repos[kind, name] = folder
        self.gated |= {name} if gated else set()
        return self.commit(folder)

    def commit(self, folder: Path) -> str:
        return hashlib.sha1(str(folder).encode()).hexdigest()


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            found = PLACE.fullmatch(path)
            if hub.down:
                return self._say(503, {"error": "down"})
            if found is None:
                return self._say(404, {"error": "no such page"})
            kind, name = found[1] or "models", found[2]
            folder = hub.repos.get((kind, name))
            if folder is None:
                return self._say(401, {"error": "no"}, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no"})
            if (
                name in hub.gated
                and self.headers.get("Authorization") != f"Bearer {hub.token}"
                and found[3] != "revision"
            ):
                more = {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {kind} {name} is restricted"}
                return self._say(403, {"error": "gated"}, more)
            commit = hub.commit(folder)
            if found[4] not in (None, "main", commit):
                return self._say(
                    404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no revision"}
                )
            if found[3] == "resolve":
                return self._file(folder / found[5], commit)
            files = [entry(folder, file) for file in sorted(folder.rglob("*")) if file.is_file()]
            if found[3] == "tree":
                return self._say(200, [each for each in files if each["path"].startswith(found[5])])
            if found[3] == "paths-info":
                wanted = self._body()
                return self._say(200, [each for each in files if each["path"] in wanted])
            gated = "manual" if name in hub.gated else False
            siblings = [{"rfilename": each["path"], "size": each["size"]} for each in files]
            return self._say(200, {"id": name, "sha": commit, "siblings": siblings, "gated": gated, "private": False})

        do_HEAD = do_POST = do_GET

        def _body(self) -> list[str]:
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            if text.startswith("{"):
                return list(json.loads(text)["paths"])
            return [unquote(part.partition("=")[2].replace("+", " ")) for part in text.split("&")]

        def _file(self, file: Path, commit: str) -> None:
            if not file.is_file():
                return self._say(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no file"})
            data = file.read_bytes()
            head = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if wanted:
                first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
                head["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
                return self._say(206, data[first : last + 1], head)
            return self._say(200, data, head)

        def _say(self, code: int, body: Any, head: dict[str, str] | None = None) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            for name, value in {"Content-Length": str(len(data)), **(head or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def entry(folder: Path, file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    name = file.relative_to(folder).as_posix()
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
