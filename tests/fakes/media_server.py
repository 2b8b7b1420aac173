"""Serve media on loopback addresses, misbehave on request, and count connections."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    Handler = Callable[[asyncio.StreamWriter], Awaitable[None]]


def respond(status: str, body: bytes = b"", **headers: str) -> Handler:
    """Return a handler that answers with ``body``; ``_`` in header names stands for ``-``."""
    lines = {"Content-Length": str(len(body)), "Connection": "close"}
    lines.update({name.replace("_", "-"): value for name, value in headers.items()})
    head = f"HTTP/1.1 {status}\r\n" + "".join(f"{key}: {value}\r\n" for key, value in lines.items())

    async def handle(writer: asyncio.StreamWriter) -> None:
        writer.write(head.encode() + b"\r\n" + body)

    return handle


async def endless(writer: asyncio.StreamWriter) -> None:
    """Answer with a body that never ends."""
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")
        await writer.drain()


async def silent(writer: asyncio.StreamWriter) -> None:
    """Announce a body and send nothing of it until the server stops."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
    await asyncio.Event().wait()


async def broken(writer: asyncio.StreamWriter) -> None:
    """Break off in the middle of the body."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")


class MediaServer:
    """A server with one handler per path; ``num_connections`` counts what reached it."""

    def __init__(self, handlers: Mapping[str, Handler] | None = None) -> None:
        self._handlers = dict(handlers or {})
        self._server: asyncio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.num_connections = 0
        self.hosts: list[str] = []
        self.port = 0

    async def start(self, host: str, port: int = 0) -> None:
        """Listen on ``host``."""
        self._server = await asyncio.start_server(self._accept, host, port)
        self.port = self._server.sockets[0].getsockname()[1]

    def add(self, path: str, handler: Handler) -> None:
        """Answer ``path`` with ``handler``."""
        self._handlers[path] = handler

    async def stop(self) -> None:
        """Close the server and its connections."""
        assert self._server is not None, "start() comes first"
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self._tasks.append(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lines = head.splitlines()
            self.hosts.extend(line[6:] for line in lines if line.lower().startswith("host: "))
            handler = self._handlers.get(lines[0].split(" ")[1], respond("404 Not Found"))
            await handler(writer)
            await writer.drain()
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


class FakeResolver:
    """Looks names up in a table; each look-up of a name takes its next answer, the last forever."""

    def __init__(self, table: Mapping[str, Sequence[Sequence[str]]]) -> None:
        self._answers = {name: list(answers) for name, answers in table.items()}
        self.num_lookups = 0

    async def resolve(self, host: str) -> Sequence[str]:
        """Return the addresses of ``host``; raise ``OSError`` if the table does not have it."""
        self.num_lookups += 1
        answers = self._answers.get(host)
        if not answers:
            raise OSError("no such host")
        return answers.pop(0) if len(answers) > 1 else answers[0]
