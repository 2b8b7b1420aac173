"""Tests of ``chiasm.common.embedded_redis`` with the real server."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from redis.asyncio import Redis

from chiasm.common.embedded_redis import EmbeddedRedis, EmbeddedRedisError
from chiasm.common.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.integration


@pytest.fixture
def state_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="chiasm-", dir="/tmp") as path:
        yield Path(path)


async def test_it_runs_from_start_to_stop_and_can_run_again(state_dir: Path) -> None:
    server = EmbeddedRedis(state_dir, max_memory_bytes=64 << 20)
    for _ in range(2):
        await server.start()
        async with Redis.from_url(server.url) as client:
            assert await client.get("key") is None
            await client.set("key", "value")
            assert (await client.config_get("maxmemory"))["maxmemory"] == str(64 << 20)
        await server.stop()
        assert server.pid is None
        assert not (state_dir / "redis.sock").exists()


async def test_nothing_is_written_to_disk(state_dir: Path) -> None:
    server = EmbeddedRedis(state_dir)
    await server.start()
    async with Redis.from_url(server.url) as client:
        await client.set("key", "value")
    await server.stop()
    assert os.listdir(state_dir) == []


async def test_a_socket_left_by_a_killed_server_is_replaced(state_dir: Path) -> None:
    (state_dir / "redis.sock").write_bytes(b"")
    server = EmbeddedRedis(state_dir)
    await server.start()
    assert server.pid is not None
    await server.stop()


async def test_a_server_that_ends_at_once_is_told(state_dir: Path) -> None:
    server = EmbeddedRedis(state_dir, max_memory_bytes=-1)
    with pytest.raises(EmbeddedRedisError, match="ended with code"):
        await server.start()
    assert server.pid is None


async def test_waiting_for_a_server_that_never_comes_ends(state_dir: Path) -> None:
    with pytest.raises(UnavailableError, match="did not answer"):
        await EmbeddedRedis(state_dir).wait_ready(timeout_s=0.05)


async def test_stopping_twice_or_before_the_start_does_nothing(state_dir: Path) -> None:
    server = EmbeddedRedis(state_dir)
    await server.stop()
    await server.start()
    await server.stop()
    await server.stop()
    assert server.pid is None
