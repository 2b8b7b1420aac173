"""A lease is given back whatever the Redis client makes of a cancellation."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from chiasm.common.errors import StoreUnavailableError
from chiasm.common.lease import Lease, LeaseSettings

if TYPE_CHECKING:
    from chiasm.common.guarded_redis import Command, GuardedRedis


class SwallowingRedis:
    """A client that turns the cancellation of its first call into an error of its own."""

    def __init__(self) -> None:
        self.is_beating = asyncio.Event()
        self.commands: list[object] = []

    async def execute_if(self, key: str, expected: bytes, command: Command) -> bool:
        """Hang in the first call until cancelled."""
        self.commands.append(command[0])
        if len(self.commands) > 1:
            return False
        self.is_beating.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise StoreUnavailableError("no answer") from None
        return True


async def test_a_swallowed_cancellation_does_not_keep_the_heartbeat_alive() -> None:
    redis = SwallowingRedis()
    lease = Lease(cast("GuardedRedis", redis), "key", LeaseSettings(heartbeat_s=0.0))

    async with asyncio.timeout(5.0), lease.hold():
        await redis.is_beating.wait()

    assert redis.commands == ["PEXPIRE", "UNLINK"]
