"""Move chunks to and from Redis in threads, over a small pool of connections."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from redis.exceptions import ConnectionError as RedisConnectionError

from chiasm.common.resp_connection import RespConnection

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from chiasm.common.redis_address import RedisAddress
    from chiasm.common.resp_connection import KeyedChunk

T = TypeVar("T")


class BulkRedis:
    """Reads and writes many large values; the event loop only waits.

    Each transfer has a thread and a connection of its own: beside a busy interpreter a thread that
    blocks in the kernel for whole chunks is several times as fast as callbacks on the event loop.
    The caller bounds how many run at once and how long they take: a cancelled transfer has its
    connection shut down, which ends the thread.
    """

    def __init__(self, address: RedisAddress, stall_s: float, max_connections: int) -> None:
        """Prepare; nothing is connected before the first transfer.

        Args:
            address: The Redis.
            stall_s: Seconds that a connection waits for Redis to do something.
            max_connections: Transfers at one time; more would queue.
        """
        self._address = address
        self._stall_s = stall_s
        self._threads = ThreadPoolExecutor(max_connections, "store-transfer")
        # Connections come back in the threads of their transfers, also while the client is closed.
        self._lock = threading.Lock()
        self._idle: list[RespConnection] = []
        self._is_closed = False

    async def write(
        self, chunks: Sequence[KeyedChunk], ttl_ms: int, note: Callable[[int], None]
    ) -> None:
        """Store chunks; see ``RespConnection.write``, which runs in a thread."""
        await self._transfer(lambda connection: connection.write(chunks, ttl_ms, note))

    async def read(
        self, chunks: Sequence[KeyedChunk], ttl_ms: int, accept: Callable[[int], bool]
    ) -> bool:
        """Read chunks into their memory; see ``RespConnection.read``, which runs in a thread."""
        return await self._transfer(lambda connection: connection.read(chunks, ttl_ms, accept))

    def close(self) -> None:
        """Close idle connections; those in use close when their transfer ends. Later ones fail."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _transfer(self, operation: Callable[[RespConnection], T]) -> T:
        connection = self._take_idle() or await self._open()
        if self._is_closed:
            connection.close()
            raise _closed()
        work = self._threads.submit(operation, connection)
        try:
            return await asyncio.wrap_future(work)
        except asyncio.CancelledError:
            work.cancel()
            connection.abort()
            raise
        finally:
            # At once, or when the thread of a cancelled transfer has ended.
            work.add_done_callback(lambda _: self._give_back(connection))
            # An error knows this frame: it must not know the error, nor through it the chunks.
            del work

    def _take_idle(self) -> RespConnection | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if connection.is_usable:
                return connection
            # Redis has closed it, as a restart does.
            connection.close()

    async def _open(self) -> RespConnection:
        if self._is_closed:
            raise _closed()
        work = self._threads.submit(RespConnection.open, self._address, self._stall_s)
        try:
            return await asyncio.wrap_future(work)
        except asyncio.CancelledError:
            work.cancel()
            work.add_done_callback(_close_opened)
            raise
        finally:
            del work

    def _give_back(self, connection: RespConnection) -> None:
        is_usable = connection.is_usable
        with self._lock:
            is_kept = is_usable and not self._is_closed
            if is_kept:
                self._idle.append(connection)
        if not is_kept:
            connection.close()


def _closed() -> RedisConnectionError:
    return RedisConnectionError("The client of the store is closed.")


def _close_opened(work: Future[RespConnection]) -> None:
    """Close the connection that nobody waits for any more, if it came to be."""
    if not work.cancelled() and work.exception() is None:
        work.result().close()
