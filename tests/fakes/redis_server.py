"""A real Redis that a test owns: it may freeze, kill and fill it."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from redis.asyncio import Redis

from chiasm.common.embedded_redis import EmbeddedRedis

if TYPE_CHECKING:
    from pathlib import Path


class RedisServer:
    """An embedded Redis with an admin client beside the code under test."""

    def __init__(self, state_dir: Path) -> None:
        self._server = EmbeddedRedis(state_dir, max_memory_bytes=256 << 20)
        self.admin = Redis.from_url(self._server.url)

    @property
    def url(self) -> str:
        """URL of the server."""
        return self._server.url

    async def start(self) -> None:
        """Start it, empty."""
        await self._server.start()

    async def stop(self) -> None:
        """Stop it, however it is doing."""
        if self._server.pid is not None:
            self.resume()
        await self.admin.aclose()
        await self._server.stop()

    async def kill(self) -> None:
        """End it as ``kill -9`` does; ``start`` starts it again."""
        self._signal(signal.SIGKILL)
        await self._server.stop()

    def freeze(self) -> None:
        """Make it hang: connections stand, nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Undo ``freeze``."""
        self._signal(signal.SIGCONT)

    async def fill(self) -> None:
        """Leave no room for another value, and evict nothing."""
        await self.admin.config_set("maxmemory-policy", "noeviction")
        await self.admin.config_set("maxmemory", "1mb")
        await self.admin.config_set("maxmemory", str(await self._used_bytes() - (64 << 10)))

    async def keys(self, suffix: str = "") -> list[str]:
        """Return all keys that end in ``suffix``, sorted."""
        found = await self.admin.keys(f"*{suffix}")
        return sorted(key.decode() for key in found if isinstance(key, bytes))

    async def value(self, key: str) -> bytes:
        """Return the string value of ``key``."""
        value = await self.admin.get(key)
        assert isinstance(value, bytes)
        return value

    async def command(self, *words: str) -> None:
        """Send a command of the administrator."""
        await self.admin.execute_command(*words)  # type: ignore[no-untyped-call]  # redis-py

    async def _used_bytes(self) -> int:
        return int((await self.admin.info("memory"))["used_memory"])

    def _signal(self, number: signal.Signals) -> None:
        assert self._server.pid is not None
        os.kill(self._server.pid, number)
