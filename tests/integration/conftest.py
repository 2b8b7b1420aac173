"""Fixtures of the integration tests: a Redis of one's own."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest_asyncio

from tests.fakes.redis_server import RedisServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest_asyncio.fixture
async def redis_server() -> AsyncIterator[RedisServer]:
    """Yield a running Redis that the test may freeze, kill and fill."""
    with tempfile.TemporaryDirectory(prefix="chiasm-", dir="/tmp") as state_dir:
        server = RedisServer(Path(state_dir))
        await server.start()
        try:
            yield server
        finally:
            await server.stop()
