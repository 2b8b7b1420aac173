"""A server that speaks enough RESP2 to hold chunks, and misbehaves as a test says."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path
    from types import TracebackType

Command = list[bytes]


@dataclass
class Misbehaviour:
    """What the server does wrong; by default nothing.

    Attributes:
        answers: Answers in place of the right ones, by the number of the command on any
            connection, counted from 0.
        piece_bytes: Bytes sent at one time; 0 sends each answer whole.
        max_answer_bytes: Bytes of answers, over all connections, after which nothing is sent.
        closes: Whether it then closes the connection instead of hanging.
        gate: What is waited for before each piece is sent.
    """

    answers: dict[int, bytes] = field(default_factory=dict)
    piece_bytes: int = 0
    max_answer_bytes: int | None = None
    closes: bool = False
    gate: asyncio.Event = field(default_factory=asyncio.Event)


class ScriptedRedis:
    """An asyncio server on a UNIX socket, or on TCP if there is no path.

    ``commands`` holds what was asked, in order; ``closed`` is set when a client has left.
    """

    def __init__(self, path: Path | None = None, tls: ssl.SSLContext | None = None) -> None:
        self._path = path
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_answer_bytes = 0
        self.port = 0
        self.values: dict[bytes, bytes] = {}
        self.commands: list[Command] = []
        self.num_connections = 0
        self.closed = asyncio.Event()
        self.wrong = Misbehaviour()
        self.wrong.gate.set()

    @property
    def url(self) -> str:
        """URL of the server."""
        if self._path is not None:
            return f"unix://{self._path}"
        return f"redis{'s' if self._tls else ''}://localhost:{self.port}"

    async def __aenter__(self) -> Self:
        if self._path is not None:
            self._server = await asyncio.start_unix_server(self._serve, self._path)
        else:
            self._server = await asyncio.start_server(self._serve, "localhost", 0, ssl=self._tls)
            self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        task = asyncio.create_task(self._talk(reader, writer))
        self._tasks.add(task)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async for command in _commands(reader):
                index = len(self.commands)
                self.commands.append(command)
                answer = self.wrong.answers.get(index, self._answer(command))
                if not await self._send(writer, answer):
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            self.closed.set()
            writer.close()

    async def _send(self, writer: asyncio.StreamWriter, answer: bytes) -> bool:
        step = self.wrong.piece_bytes or max(1, len(answer))
        for start in range(0, len(answer), step):
            await self.wrong.gate.wait()
            piece = answer[start : start + step]
            if self.wrong.max_answer_bytes is not None:
                piece = piece[: self.wrong.max_answer_bytes - self._num_answer_bytes]
            self._num_answer_bytes += len(piece)
            writer.write(piece)
            await writer.drain()
            if self._num_answer_bytes == self.wrong.max_answer_bytes:
                if self.wrong.closes:
                    return False
                await asyncio.Event().wait()
            await asyncio.sleep(0)
        return True

    def _answer(self, command: Command) -> bytes:
        known: dict[bytes, Callable[..., bytes]] = {
            b"AUTH": lambda *words: b"+OK\r\n",
            b"SELECT": lambda *words: b"+OK\r\n",
            b"SET": self._set,
            b"PEXPIRE": lambda key, ttl_ms: b":%d\r\n" % (key in self.values),
            b"GETRANGE": self._get_range,
        }
        return known[command[0]](*command[1:])

    def _set(self, key: bytes, value: bytes, px: bytes, ttl_ms: bytes) -> bytes:
        assert (px, int(ttl_ms) > 0) == (b"PX", True)
        self.values[key] = value
        return b"+OK\r\n"

    def _get_range(self, key: bytes, first: bytes, last: bytes) -> bytes:
        value = self.values.get(key, b"")[int(first) : int(last) + 1]
        return b"$%d\r\n%b\r\n" % (len(value), value)


async def _commands(reader: asyncio.StreamReader) -> AsyncIterator[Command]:
    while line := await reader.readline():
        words = []
        for _ in range(int(line[1:])):
            num_bytes = int((await reader.readline())[1:])
            words.append((await reader.readexactly(num_bytes + 2))[:-2])
        yield words
