"""Fixtures for all tests: a real Redis shared by the session."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chiasm.common.embedded_redis import EmbeddedRedis

if TYPE_CHECKING:
    from collections.abc import Iterator

# All that is imported to find the tests stays: a minute of a run went into looking at it again.
gc.disable()
# Before anything imports torch: beside a busy process the threads of one operator spin for each
# other, and tests take thirty times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before anything imports triton: without a GPU its kernels run in its interpreter.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """Look for garbage again, but not among what is there by now."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """Yield the URL of a real Redis for the whole session; tests keep apart by tenant or secret."""
    # Not tmp_path: a socket path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="chiasm-", dir="/tmp") as state_dir:
        server = EmbeddedRedis(Path(state_dir), max_memory_bytes=256 << 20)
        with subprocess.Popen(server.command(), stdout=subprocess.DEVNULL) as process:
            try:
                asyncio.run(server.wait_ready())
                yield server.url
            finally:
                process.terminate()
