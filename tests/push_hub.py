"""A model hub for tests: the part of the hub's protocol that an upload by LFS speaks, over real sockets."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_test"


@dataclass
class Hub:
    """`repos` holds {"private", "files"} by id; `stored` large files by SHA-256; `requests` what was asked, in order.

    `failures` is how many more uploads of large files end in a broken connection; `statuses` are answered to the next commits.
    """

    url: str = ""
    repos: dict[str, dict[str, Any]] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    failures: int = 0
    statuses: list[int] = field(default_factory=list)
    may_write: bool = True


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: Any, code: str | None = None) -> None:
            text = json.dumps(body).encode()
            self.send_response(status)
            if code is not None:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def read(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def handle_one(self) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            body = self.read()
            if path.startswith("/lfs/"):
                return self.store(path.rpartition("/")[2], body)
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "Invalid username or password."})
            if path == "/api/whoami-v2":
                return self.answer(200, {"name": "tester", "type": "user"})
            if path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if self.command == "POST" and not hub.may_write:
                return self.answer(403, {"error": "You do not have the rights."})
            if path == "/api/repos/create":
                return self.create(json.loads(body))
            if path.endswith("/info/lfs/objects/batch"):
                return self.answer(200, {"objects": [self.wanted(one) for one in json.loads(body)["objects"]]})
            name = "/".join(path.split("/")[3:5])
            if name not in hub.repos:
                return self.answer(404, {"error": "Repository not found"}, "RepoNotFound")
            if path == f"/api/models/{name}":
                return self.answer(200, {"id": name, "private": hub.repos[name]["private"], "siblings": []})
            if path == f"/api/models/{name}/preupload/main":
                modes = {True: "lfs", False: "regular"}
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": modes[file["path"].endswith(".safetensors")],
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
                return self.answer(200, {"files": files})
            if path == f"/api/models/{name}/commit/main":
                if hub.statuses:
                    return self.answer(hub.statuses.pop(0), {"error": "A commit has happened since."})
                return self.commit(name, body)
            return self.answer(404, {"error": f"this hub does not know {path}"})

        def create(self, asked: dict[str, Any]) -> None:
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            status = 409 if name in hub.repos else 200
            hub.repos.setdefault(name, {"private": asked.get("visibility") == "private", "files": {}})
            self.answer(status, {"url": f"{hub.url}/{name}", "error": "You already created this model repo"})

        def wanted(self, one: dict[str, Any]) -> dict[str, Any]:
            if one["oid"] in hub.stored:
                return one
            return one | {"actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}

        def store(self, digest: str, body: bytes) -> None:
            if hub.failures:
                hub.failures -= 1
                self.close_connection = True
                return self.connection.close()
            assert hashlib.sha256(body).hexdigest() == digest
            hub.stored[digest] = body
            return self.answer(200, {})

        def commit(self, name: str, body: bytes) -> None:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.repos[name]["files"][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.repos[name]["files"][value["path"]] = hub.stored[value["oid"]]
            self.answer(200, {"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1" * 40, "success": True})

        do_GET = do_POST = do_PUT = handle_one

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
