"""Fixtures of the encoder's unit tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest_asyncio

from chiasm.encoder.decode_pool import DecodeLimits, DecodePool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def decoder() -> AsyncIterator[DecodePool]:
    """Yield decode workers shared by the tests that leave them alive."""
    limits = DecodeLimits(memory_bytes=1 << 30, cpu_limit_s=10, timeout_s=30.0, niceness=0)
    pool = DecodePool(2, limits)
    pool.start()
    yield pool
    pool.stop()
