"""A proxy that does to the k-th request exactly what a bad day does to it. Real sockets on both sides."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

FAULTS = ("503", "500", "reset-before", "reset-after", "truncated", "beheaded", "flipped", "stall", "expired")
ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>the proxy says so</Message></Error>"


@dataclass
class Message:
    """One HTTP request or answer. `head` ends with the blank line."""

    head: bytes
    body: bytes

    @property
    def first(self) -> str:
        return self.head.split(b"\r\n", 1)[0].decode()

    def header(self, name: str) -> str | None:
        for line in self.head.decode("latin-1").split("\r\n")[1:]:
            key, _, value = line.partition(":")
            if key.lower() == name:
                return value.strip()
        return None


@dataclass
class Proxy:
    """Between a client and the server at `upstream`. `fault` falls on request number `at`, counted from 1, or on all (-1).

    `rate` is bytes per second over all connections (0: no limit), `delay` seconds before each answer. A beheaded answer
    ends three bytes behind `cut`, or in the middle of its head where it has no such header.
    """

    upstream: tuple[str, int]
    fault: str = ""
    at: int = 0
    stall: float = 10.0
    rate: float = 0.0
    delay: float = 0.0
    cut: bytes = b"etag: "
    before: Callable[[Message], bytes | None] | None = None
    seen: list[str] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    port: int = 0

    def __enter__(self) -> Proxy:
        self._loop = asyncio.new_event_loop()
        self._free_at = 0.0
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self._thread.start()
        ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _serve(self, ready: threading.Event) -> None:
        async def main() -> None:
            self._ended = asyncio.Event()
            self._tasks: set[asyncio.Task[None]] = set()
            server = await asyncio.start_server(self._accepted, "127.0.0.1", 0, limit=2**20)
            self.port = server.sockets[0].getsockname()[1]
            ready.set()
            await self._ended.wait()
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        self._loop.run_until_complete(main())
        self._loop.close()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        up_reader, up_writer = await asyncio.open_connection(*self.upstream, limit=2**20)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await self._one(reader, writer, up_reader, up_writer):
                    pass
        finally:
            writer.close()
            up_writer.close()

    async def _one(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
    ) -> bool:
        """One request and its answer. False when the connection is over."""
        request = await self._read(reader)
        if request is None:
            return False
        self.seen.append(request.first)
        self.heads.append(request.head)
        number = len(self.seen)
        fault = self.fault if self.at in (number, -1) or (self.fault == "expired" and 0 < self.at <= number) else ""
        own = self.before(request) if self.before else None
        if own is not None or fault in ("503", "500", "expired"):
            writer.write(own or _refusal(fault))
            await writer.drain()
            return True
        if fault == "reset-before":
            _reset(writer)
            return False
        if fault == "flipped" and request.body:
            request.body = _flip(request.body)
            fault = ""
        up_writer.write(request.head + request.body)
        await up_writer.drain()
        answer = await self._read(up_reader, head_only=request.first.startswith("HEAD"))
        if answer is None or fault == "reset-after":
            _reset(writer)
            return False
        if fault == "flipped" and answer.body:
            answer.body = _flip(answer.body)
        await asyncio.sleep(self.delay + (self.stall if fault == "stall" else 0.0))
        whole = answer.head + answer.body
        if fault in ("truncated", "beheaded"):
            found = answer.head.lower().find(self.cut)
            within = found + len(self.cut) + 3 if found >= 0 else len(answer.head) // 2
            cut = len(answer.head) + len(answer.body) // 2 if fault == "truncated" and answer.body else within
            writer.write(whole[:cut])
            await writer.drain()
            return False
        for start in range(0, len(whole), 2**18):
            await self._pace(len(whole[start : start + 2**18]))
            writer.write(whole[start : start + 2**18])
            await writer.drain()
        return True

    async def _read(self, reader: asyncio.StreamReader, *, head_only: bool = False) -> Message | None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return None
        message = Message(head, b"")
        if head.startswith(b"HTTP/1.1 100"):
            return await self._read(reader)
        if not head_only and message.header("transfer-encoding") == "chunked":
            message.body = await _chunks(reader)
        elif not head_only and (length := int(message.header("content-length") or 0)):
            parts = bytearray()
            while len(parts) < length:
                part = await reader.read(min(2**18, length - len(parts)))
                if not part:
                    return None
                parts += part
                await self._pace(len(part))
            message.body = bytes(parts)
        return message

    async def _pace(self, count: int) -> None:
        """One wire for everybody: each piece takes its time on it."""
        if self.rate and count:
            now = self._loop.time()
            self._free_at = max(self._free_at, now) + count / self.rate
            await asyncio.sleep(self._free_at - now)


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    """A chunked body, still in its chunks."""
    body = b""
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        body += line + await reader.readexactly(size + 2)
        if size == 0:
            return body


def answer(status: str, body: str, *headers: str) -> bytes:
    """A whole HTTP answer."""
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/xml", f"Content-Length: {len(body.encode())}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


def _refusal(fault: str) -> bytes:
    if fault == "503":
        return answer("503 Slow Down", ERROR.format(code="SlowDown"))
    if fault == "500":
        return answer("500 Internal Server Error", ERROR.format(code="InternalError"))
    return answer("403 Forbidden", ERROR.format(code="ExpiredToken"))


def _flip(body: bytes) -> bytes:
    """One bit of the byte in the middle."""
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST rather than FIN."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
