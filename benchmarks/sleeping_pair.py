"""Two encoders whose towers sleep, and one Redis for both."""

from __future__ import annotations

import asyncio
import re
import socket
import tempfile
import urllib.request
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.fakes.redis_server import RedisServer
from tests.harness.encoder import EncoderProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_LAG = "chiasm_process_loop_lag_seconds"
MAX_LAG_S = 0.02


@dataclass(frozen=True, slots=True)
class Lag:
    """How often an event loop was looked at, and how often it was later than ``MAX_LAG_S``."""

    num_ticks: float
    num_late: float

    def since(self, before: Lag) -> float:
        """Return the part that was late since ``before``, in percent."""
        num_ticks = self.num_ticks - before.num_ticks
        return 100 * (self.num_late - before.num_late) / num_ticks


@dataclass(frozen=True, slots=True)
class SleepingEncoder:
    """An encoder whose tower sleeps, and the port of its metrics."""

    process: EncoderProcess
    metrics_port: int

    async def lag(self) -> Lag:
        """Return what the encoder says of its event loop."""
        text = await asyncio.to_thread(self._metrics)
        num_ticks = _sample(text, f"{_LAG}_count")
        return Lag(num_ticks, num_ticks - _sample(text, f'{_LAG}_bucket{{le="{MAX_LAG_S}"}}'))

    def _metrics(self) -> str:
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10.0) as response:
            text: str = response.read().decode()
        return text


@asynccontextmanager
async def sleeping_pair(
    model: Path, seconds: float
) -> AsyncIterator[tuple[SleepingEncoder, SleepingEncoder]]:
    """Run two encoders of ``model`` whose towers take ``seconds`` per item."""
    # Not the usual place: the path of the Redis socket in it has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="chiasm-", dir="/tmp") as directory:
        redis = RedisServer(Path(directory))
        await redis.start()
        first, second = (_encoder(model, redis.url, Path(directory), seconds) for _ in range(2))
        try:
            await first.process.start()
            await second.process.start()
            yield first, second
        finally:
            await first.process.stop()
            await second.process.stop()
            await redis.stop()


def sleeping_process(
    model: Path, redis_url: str, state_dir: Path, seconds: float, metrics_port: int = 0
) -> EncoderProcess:
    """Return an encoder that is not yet started, with the secrets of ``state_dir``."""
    return EncoderProcess(
        model,
        redis_url,
        state_dir,
        ["--metrics-port", str(metrics_port)],
        ("benchmarks.sleeping_encoder", str(seconds)),
    )


def _encoder(model: Path, redis_url: str, state_dir: Path, seconds: float) -> SleepingEncoder:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return SleepingEncoder(sleeping_process(model, redis_url, state_dir, seconds, port), port)


def _sample(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found is not None, f"the encoder tells {name}"
    return float(found[1])
