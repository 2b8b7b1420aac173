"""Hold a key in Redis for as long as some work takes, and wake those who wait when it is over."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from redis.exceptions import RedisError

from chiasm.common.errors import StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from redis.asyncio.client import PubSub

    from chiasm.common.guarded_redis import GuardedRedis

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LeaseSettings:
    """Times of a lease.

    Attributes:
        duration_s: Seconds after which the lease of a holder that died is free.
        heartbeat_s: Seconds between two renewals by a living holder.
        check_s: Longest time a waiter waits for word before it looks for itself.
        patience_s: Longest time a waiter waits in all; then it does the work too.
    """

    duration_s: float = 3.0
    heartbeat_s: float = 1.0
    check_s: float = 0.5
    patience_s: float = 60.0


class Lease:
    """One process's claim on ``key``; an instance is used once.

    The lease saves work and nothing else. A holder that lost it, because it was frozen for longer
    than ``duration_s``, may go on: nothing that it writes depends on being alone.
    """

    def __init__(self, redis: GuardedRedis, key: str, settings: LeaseSettings) -> None:
        self._redis = redis
        self._key = key
        self._channel = f"{key}:free"
        self._settings = settings
        self._owner = os.urandom(16).hex().encode()

    async def acquire_unless(self, find_result: Callable[[], Awaitable[T | None]]) -> T | None:
        """Wait until the lease is ours or the work has a result, whichever comes first.

        Args:
            find_result: Returns what the holder of the lease leaves behind, or ``None``.

        Returns:
            The result, and then the lease is not ours; or ``None``: the work is ours to do.

        Raises:
            StoreUnavailableError: Redis cannot be used now.
        """
        is_ours, result = await self._try(find_result)
        if is_ours or result is not None:
            return result
        try:
            async with (
                asyncio.timeout(self._settings.patience_s),
                self._redis.subscribed(self._channel) as freed,
            ):
                while not is_ours and result is None:
                    is_ours, result = await self._try(find_result)
                    if not is_ours and result is None:
                        await self._wait(freed)
        except TimeoutError:
            return None
        return result

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Renew the acquired lease while inside; afterwards free it and wake who waits for it.

        Losing Redis inside is no error: the work goes on, and others may do it too.
        """
        is_over = asyncio.Event()
        heartbeat = asyncio.create_task(self._beat(is_over))
        try:
            yield
        finally:
            # NOTE: a library may lose a cancellation, as redis-py does; the guard around it heeds
            # them, but work goes on in vain if the heartbeat depends on that to end.
            is_over.set()
            heartbeat.cancel()
            await asyncio.wait([heartbeat])
            await self._free()

    async def _try(self, find_result: Callable[[], Awaitable[T | None]]) -> tuple[bool, T | None]:
        (reply,) = await self._redis.execute(
            [("SET", self._key, self._owner, "NX", "PX", self._duration_ms)]
        )
        # Looking comes second: who finds the lease free may find the result there already.
        result = await find_result()
        if reply and result is not None:
            await self._free()
        return bool(reply), result

    async def _wait(self, freed: PubSub) -> None:
        try:
            await freed.get_message(timeout=self._settings.check_s)
        except (RedisError, OSError) as error:
            raise StoreUnavailableError("The embedding store is unreachable.") from error

    async def _beat(self, is_over: asyncio.Event) -> None:
        renew = ("PEXPIRE", self._key, self._duration_ms)
        while not is_over.is_set():
            await asyncio.sleep(self._settings.heartbeat_s)
            try:
                await self._redis.execute_if(self._key, self._owner, renew)
            except StoreUnavailableError:
                continue

    async def _free(self) -> None:
        try:
            if await self._redis.execute_if(self._key, self._owner, ("UNLINK", self._key)):
                await self._redis.execute([("PUBLISH", self._channel, b"")])
        except StoreUnavailableError:
            return

    @property
    def _duration_ms(self) -> int:
        return int(self._settings.duration_s * 1000)
