"""moto's S3 over real sockets, with each write whole: `python tests/moto_server.py PORT`.

moto compares If-Match and If-None-Match with what is there and writes in two steps, so that two threads of it may both
win. S3 lets one win, and what these tests prove rests on that.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from io import BytesIO
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple


class OneWriteAtATime:
    """A WSGI application that reads the body of a write whole, and then lets one write at a time into `application`."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self.application = application
        self.writes = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return self.application(environ, start_response)
        chunked = environ.get("wsgi.input_terminated")
        body = environ["wsgi.input"].read(-1 if chunked else int(environ.get("CONTENT_LENGTH") or 0))
        with self.writes:
            return list(self.application({**environ, "wsgi.input": BytesIO(body)}, start_response))


if __name__ == "__main__":
    moto = DomainDispatcherApplication(create_backend_app)
    os.environ["MOTO_PORT"] = sys.argv[1]
    run_simple("127.0.0.1", int(sys.argv[1]), OneWriteAtATime(moto), threaded=True)
