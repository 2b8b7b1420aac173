"""Speak as much of RESP2 as moving chunks takes: pipelined ``SET`` and ``GETRANGE``, no copies.

What a right answer looks like is known to the byte before it is asked for, so answers are received
into their final memory and compared, never parsed; anything else ends the exchange.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from chiasm.common.resp_wire import open_wire

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chiasm.common.redis_address import RedisAddress
    from chiasm.common.resp_wire import Wire

# Chunks that are asked for at one time, or sent before the first of them is acknowledged.
WINDOW_CHUNKS = 2
MAX_LINE_BYTES = 512

_END = b"\r\n"
_ERRORS: dict[str, type[RedisError]] = {
    "LOADING": BusyLoadingError,
    "NOAUTH": AuthenticationError,
    "NOPERM": NoPermissionError,
    "OOM": OutOfMemoryError,
    "READONLY": ReadOnlyError,
    "WRONGPASS": AuthenticationError,
}


@dataclass(frozen=True, slots=True)
class KeyedChunk:
    """A key and the memory of its value: what is written, or where what is read goes."""

    key: str
    memory: memoryview


class RespConnection:
    """A logged-in connection; one thread uses it at a time.

    Its methods raise what redis-py raises: ``redis.exceptions.TimeoutError`` after a stall,
    ``redis.exceptions.ConnectionError`` or ``OSError`` if the connection is lost or answers
    nonsense, ``ResponseError`` if Redis refuses a command.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._scratch = memoryview(bytearray(MAX_LINE_BYTES))
        self._received = b""
        self._is_in_step = True
        self._is_closed = False
        # Who aborts must not shut down a descriptor that was closed and is another's by now.
        self._end = threading.Lock()

    @classmethod
    def open(cls, address: RedisAddress, stall_s: float) -> RespConnection:
        """Connect to ``address`` and log in; ``stall_s`` bounds every wait for the peer.

        Raises:
            RedisError: Redis refuses the user, the password or the database.
        """
        wire = open_wire(address, stall_s)
        try:
            connection = cls(wire)
            if address.password:
                words = [address.username] if address.username else []
                connection._command("AUTH", *words, address.password)
            if address.database:
                connection._command("SELECT", str(address.database))
        except BaseException:
            wire.close()
            raise
        return connection

    @property
    def is_usable(self) -> bool:
        """Whether every answer has been read and the peer is still there."""
        return (
            self._is_in_step
            and not self._received
            and not self._is_closed
            and self._wire.is_quiet()
        )

    def write(self, chunks: Sequence[KeyedChunk], ttl_ms: int, note: Callable[[int], None]) -> None:
        """Store chunks.

        Args:
            chunks: Keys and contents; must not change until this returns.
            ttl_ms: Milliseconds they live.
            note: Called with the index of each chunk while Redis reads it.

        Raises:
            ResponseError: Redis refuses one; all that was sent is answered, later ones are unsent.
        """
        self._is_in_step = False
        tail = b"".join((_END, *map(_bulk, (b"PX", str(ttl_ms).encode()))))
        errors: list[RedisError] = []
        num_unanswered = 0
        for index, chunk in enumerate(chunks):
            head = _head(5, b"SET", chunk.key.encode()) + b"$%d\r\n" % chunk.memory.nbytes
            self._wire.send([memoryview(head), chunk.memory, memoryview(tail)])
            num_unanswered += 1
            note(index)
            if num_unanswered > WINDOW_CHUNKS:
                num_unanswered -= 1
                errors += self._read_status()
            if errors:
                break
        for _ in range(num_unanswered):
            errors += self._read_status()
        self._is_in_step = True
        if errors:
            # An error knows this frame: what the frame keeps of it would keep the chunks alive.
            raise errors.pop(0)

    def read(
        self, chunks: Sequence[KeyedChunk], ttl_ms: int, accept: Callable[[int], bool]
    ) -> bool:
        """Read chunks into their memory and renew their time.

        Args:
            chunks: Keys and where their values go; a value of another length is refused unread.
            ttl_ms: Milliseconds they live from now on.
            accept: Called with the index of each chunk when its memory is filled, while the next
                is on its way; tells whether the content is right.

        Returns:
            Whether all were there, of the right length and accepted. If not, memory that was not
            accepted holds anything, and the connection cannot be used any more.

        Raises:
            ResponseError: Redis refuses a command.
        """
        self._is_in_step = False
        requests = [_read_request(chunk, ttl_ms) for chunk in chunks]
        self._wire.send([memoryview(b"".join(requests[:WINDOW_CHUNKS]))])
        end = b""
        for index, chunk in enumerate(chunks):
            num_bytes = self._read_head(b"%b:1\r\n$%d\r\n" % (end, chunk.memory.nbytes), chunk)
            if num_bytes is None:
                return False
            for request in requests[index + WINDOW_CHUNKS : index + WINDOW_CHUNKS + 1]:
                self._wire.send([memoryview(request)])
            self._wire.fill(chunk.memory[num_bytes:])
            if not accept(index):
                return False
            end = _END
        self._wire.fill(self._scratch[: len(end)])
        if self._scratch[: len(end)] != end:
            return False
        self._is_in_step = True
        return True

    def abort(self) -> None:
        """Make a call in another thread fail at once; the connection cannot be used any more."""
        with self._end:
            if not self._is_closed:
                self._wire.abort()

    def close(self) -> None:
        """Close the socket; no thread may be in a call. May be repeated."""
        with self._end:
            self._is_closed = True
            self._wire.close()

    def _command(self, *words: str) -> None:
        parts = [word.encode() for word in words]
        self._wire.send([memoryview(_head(len(parts), *parts))])
        if errors := self._read_status():
            raise errors.pop()

    def _read_head(self, expected: bytes, chunk: KeyedChunk) -> int | None:
        """Receive ``expected`` and the begin of the chunk behind it.

        Returns:
            Bytes of the chunk that came along; ``None`` if the answer is no such chunk.
        """
        head = self._scratch[: len(expected)]
        num_bytes = 0
        while num_bytes < len(expected):
            num_bytes += self._wire.receive([head[num_bytes:], chunk.memory])
            found = bytes(head[:num_bytes])
            if not expected.startswith(found):
                num_beyond = max(0, num_bytes - len(expected))
                self._raise_if_error(found + bytes(chunk.memory[: min(num_beyond, MAX_LINE_BYTES)]))
                return None
        return num_bytes - len(expected)

    def _raise_if_error(self, begin: bytes) -> None:
        """Raise the error that ``begin``, an answer to a read, announces; a wrong type is none."""
        first, _, rest = begin.removeprefix(_END).partition(_END)
        self._received = rest if first.startswith(b":") else begin.removeprefix(_END)
        if not self._received.startswith(b"-"):
            return
        line = self._read_line()
        if not line.startswith(b"-WRONGTYPE"):
            raise _error(line)

    def _read_status(self) -> list[RedisError]:
        """Return the error that the next answer is, if it is one."""
        line = self._read_line()
        if line == b"+OK":
            return []
        if line.startswith(b"-"):
            return [_error(line)]
        raise RedisConnectionError("Redis answers what was not asked for.")

    def _read_line(self) -> bytes:
        while _END not in self._received:
            if len(self._received) > MAX_LINE_BYTES:
                raise RedisConnectionError("Redis answers with a line that is too long.")
            num_bytes = self._wire.receive([self._scratch])
            self._received += bytes(self._scratch[:num_bytes])
        line, _, self._received = self._received.partition(_END)
        return line


def _read_request(chunk: KeyedChunk, ttl_ms: int) -> bytes:
    key = chunk.key.encode()
    # One byte more than expected tells a value that is too long, however long it is.
    last = str(chunk.memory.nbytes).encode()
    renewal = _head(3, b"PEXPIRE", key, str(ttl_ms).encode())
    return renewal + _head(4, b"GETRANGE", key, b"0", last)


def _head(num_words: int, *words: bytes) -> bytes:
    """Return the begin of a command of ``num_words`` words up to the last of ``words``."""
    return b"*%d\r\n" % num_words + b"".join(map(_bulk, words))


def _bulk(word: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(word), word)


def _error(line: bytes) -> RedisError:
    text = line[1:].decode("utf-8", "replace")
    return _ERRORS.get(text.partition(" ")[0], ResponseError)(text)
