"""Chunks of embeddings to and from Redis: our client, redis-py, and what memory and sockets allow.

Starts a private Redis and moves embeddings of three sizes by UNIX socket and by TCP. All that is
compared takes turns in one process; medians and spread of one run are printed::

    python -m benchmarks.store

Every contestant stores the same chunks of at most 1 MiB with a time to live, and reads them into
the same memory while renewing their time; contents are compared after every read. redis-py runs
with hiredis, pipelines four chunks at a time, and copies its replies into the memory. ``socket``
is a thread that writes to another over a socket pair, without Redis; ``put`` and ``get`` are the
whole store with manifest and digests.
"""

from __future__ import annotations

import asyncio
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import redis as sync_redis
import uvloop
from redis import asyncio as async_redis

from chiasm.common.bulk_redis import BulkRedis
from chiasm.common.chunks import CHUNK_BYTES
from chiasm.common.embedded_redis import SOCKET_NAME, EmbeddedRedis
from chiasm.common.embedding_store import EmbeddingStore
from chiasm.common.guarded_redis import CallBudget
from chiasm.common.host_memory import allocate
from chiasm.common.media import DataType, Embedding, EmbeddingRef, Modality, TensorRole, TensorSpec
from chiasm.common.redis_address import RedisAddress
from chiasm.common.resp_connection import KeyedChunk
from chiasm.common.secrets import StoreSecrets
from tests.fakes.embeddings import make_layout

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Act = Callable[[], Awaitable[object]]

SIZES_BYTES = (4_718_592, 20_000_000, 67_108_864)
NUM_ROUNDS = {4_718_592: 30, 20_000_000: 15, 67_108_864: 9}
NUM_WARM_UP_ROUNDS = 2
PIPELINE_CHUNKS = 4
TTL_MS = 600_000
TIMEOUT_S = 60.0
WIDTH = 4096


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds of one act: by the clock, and of the processors in this process and in Redis."""

    wall_s: float
    own_s: float
    redis_s: float


@dataclass(frozen=True, slots=True)
class Workload:
    """An embedding in chunks: what is written, and memory into which it is read."""

    contents: list[KeyedChunk]
    targets: list[KeyedChunk]
    memory: memoryview

    @classmethod
    def make(cls, num_bytes: int) -> Workload:
        """Return random contents of ``num_bytes`` and as much memory."""
        content, memory = memoryview(Random(0).randbytes(num_bytes)), allocate(num_bytes)
        return cls(_chunks(content), _chunks(memory), memory)

    def check(self) -> None:
        """Fail if the memory does not hold what was written; then clear it."""
        if self.contents != self.targets:
            raise SystemExit("what was read is not what was written")
        self.memory[:] = bytes(self.memory.nbytes)


def main() -> None:
    """Run all comparisons and print their tables."""
    with tempfile.TemporaryDirectory(prefix="chiasm-", dir="/tmp") as directory:
        uvloop.run(_compare(Path(directory)))


async def _compare(state_dir: Path) -> None:
    async with _redis(state_dir) as urls:
        for name, url in urls.items():
            for num_bytes in SIZES_BYTES:
                await _compare_at(name, url, num_bytes)


async def _compare_at(name: str, url: str, num_bytes: int) -> None:
    work = Workload.make(num_bytes)
    bulk = BulkRedis(RedisAddress.parse(url), TIMEOUT_S, 1)
    client, sync_client = async_redis.Redis.from_url(url), sync_redis.Redis.from_url(url)
    store = EmbeddingStore.connect(url, StoreSecrets.generate(), budget=CallBudget.of(TIMEOUT_S))
    embedding = _embedding(work, num_bytes)
    acts: dict[str, Act] = {
        "SET ours": lambda: bulk.write(work.contents, TTL_MS, lambda index: None),
        "SET redis-py asyncio": lambda: _async_write(client, work),
        "SET redis-py": lambda: asyncio.to_thread(_sync_write, sync_client, work),
        "GET ours": lambda: bulk.read(work.targets, TTL_MS, lambda index: True),
        "GET redis-py asyncio": lambda: _async_read(client, work),
        "GET redis-py": lambda: asyncio.to_thread(_sync_read, sync_client, work),
        "put": lambda: store.put("a", embedding, make_layout(embedding.ref)),
        "get": lambda: store.get("a", embedding.ref),
        "memcpy": lambda: asyncio.to_thread(_copy, work),
        "socket": lambda: _through_socket(work, is_unix=name == "UNIX"),
    }
    samples: dict[str, list[Sample]] = {act: [] for act in acts}
    for round_index in range(NUM_WARM_UP_ROUNDS + NUM_ROUNDS[num_bytes]):
        for act_name, act in acts.items():
            sample = await _sample(act, client)
            if round_index >= NUM_WARM_UP_ROUNDS:
                samples[act_name].append(sample)
            if act_name.startswith("GET"):
                work.check()
        # Chunks that a later put replaces would fill Redis.
        await store.delete("a", embedding.ref.embedding_id)
    _print_table(f"{name} {num_bytes / 1e6:.1f} MB", num_bytes, samples)
    bulk.close()
    sync_client.close()
    await client.aclose()
    await store.close()


async def _sample(act: Act, client: async_redis.Redis) -> Sample:
    redis_s = await _redis_cpu_s(client)
    started, own_s = time.perf_counter(), time.process_time()
    await act()
    wall_s, own_s = time.perf_counter() - started, time.process_time() - own_s
    return Sample(wall_s, own_s, await _redis_cpu_s(client) - redis_s)


async def _redis_cpu_s(client: async_redis.Redis) -> float:
    usage = await client.info("cpu")
    return float(usage["used_cpu_user"]) + float(usage["used_cpu_sys"])


@asynccontextmanager
async def _redis(state_dir: Path) -> AsyncIterator[dict[str, str]]:
    """Yield the URLs of a private Redis that listens on a UNIX socket and on TCP."""
    embedded = EmbeddedRedis(state_dir, max_memory_bytes=1 << 30)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = embedded.command()
    command[command.index("--port") + 1] = str(port)
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
    try:
        await embedded.wait_ready()
        socket_path = state_dir / SOCKET_NAME
        yield {"UNIX": f"unix://{socket_path}", "TCP": f"redis://127.0.0.1:{port}"}
    finally:
        process.terminate()
        await process.wait()


def _chunks(memory: memoryview) -> list[KeyedChunk]:
    starts = range(0, memory.nbytes, CHUNK_BYTES)
    return [KeyedChunk(f"chunk:{at}", memory[at : at + CHUNK_BYTES]) for at in starts]


def _embedding(work: Workload, num_bytes: int) -> Embedding:
    shape = (num_bytes // (2 * WIDTH), WIDTH)
    spec = TensorSpec(TensorRole.SPLICE, DataType.BFLOAT16, shape)
    ref = EmbeddingRef(bytes(32), bytes(32), Modality.IMAGE, (spec,))
    content = b"".join(chunk.memory for chunk in work.contents)
    return Embedding(ref, [memoryview(content)[: spec.num_bytes]])


async def _async_write(client: async_redis.Redis, work: Workload) -> None:
    for start in range(0, len(work.contents), PIPELINE_CHUNKS):
        async with client.pipeline(transaction=False) as pipeline:
            for chunk in work.contents[start : start + PIPELINE_CHUNKS]:
                pipeline.set(chunk.key, chunk.memory, px=TTL_MS)
            await pipeline.execute()


async def _async_read(client: async_redis.Redis, work: Workload) -> None:
    for start in range(0, len(work.targets), PIPELINE_CHUNKS):
        targets = work.targets[start : start + PIPELINE_CHUNKS]
        async with client.pipeline(transaction=False) as pipeline:
            for chunk in targets:
                pipeline.getrange(chunk.key, 0, chunk.memory.nbytes)
                pipeline.pexpire(chunk.key, TTL_MS)
            _fill(targets, await pipeline.execute())


def _sync_write(client: sync_redis.Redis, work: Workload) -> None:
    for start in range(0, len(work.contents), PIPELINE_CHUNKS):
        with client.pipeline(transaction=False) as pipeline:
            for chunk in work.contents[start : start + PIPELINE_CHUNKS]:
                pipeline.set(chunk.key, chunk.memory, px=TTL_MS)
            pipeline.execute()


def _sync_read(client: sync_redis.Redis, work: Workload) -> None:
    for start in range(0, len(work.targets), PIPELINE_CHUNKS):
        targets = work.targets[start : start + PIPELINE_CHUNKS]
        with client.pipeline(transaction=False) as pipeline:
            for chunk in targets:
                pipeline.getrange(chunk.key, 0, chunk.memory.nbytes)
                pipeline.pexpire(chunk.key, TTL_MS)
            _fill(targets, pipeline.execute())


def _fill(targets: list[KeyedChunk], replies: list[bytes]) -> None:
    for chunk, content in zip(targets, replies[::2], strict=True):
        chunk.memory[:] = content


def _copy(work: Workload) -> None:
    for chunk, target in zip(work.contents, work.targets, strict=True):
        target.memory[:] = chunk.memory


async def _through_socket(work: Workload, *, is_unix: bool) -> None:
    sender, receiver = _socket_pair(is_unix=is_unix)

    def send() -> None:
        for chunk in work.contents:
            sender.sendall(chunk.memory)

    def receive() -> None:
        for chunk in work.targets:
            receiver.recv_into(chunk.memory, 0, socket.MSG_WAITALL)

    with sender, receiver:
        await asyncio.gather(asyncio.to_thread(send), asyncio.to_thread(receive))


def _socket_pair(*, is_unix: bool) -> tuple[socket.socket, socket.socket]:
    if is_unix:
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = socket.create_connection(listener.getsockname())
        return sender, listener.accept()[0]


def _print_table(title: str, num_bytes: int, samples: dict[str, list[Sample]]) -> None:
    sys.stdout.write(f"{title} (n = {len(samples['memcpy'])})\n")
    for name, taken in samples.items():
        wall_s = [sample.wall_s for sample in taken]
        median_s = statistics.median(wall_s)
        ours_s = statistics.median(
            sample.wall_s for sample in samples.get(f"{name[:3]} ours", taken)
        )
        own_s = statistics.mean(sample.own_s for sample in taken)
        redis_s = statistics.mean(sample.redis_s for sample in taken)
        sys.stdout.write(
            f"  {name:21s} median {median_s * 1e3:7.2f} ms"
            f"  (min {min(wall_s) * 1e3:7.2f}, max {max(wall_s) * 1e3:7.2f})"
            f"  {num_bytes / median_s / 1e9:5.2f} GB/s  CPU own {own_s * 1e3:6.2f},"
            f" Redis {redis_s * 1e3:6.2f} ms"
            + (f"  {median_s / ours_s:5.2f} x ours\n" if ours_s != median_s else "\n")
        )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
