"""Tests of ``chiasm.common.bulk_redis`` and the connections under it, with a scripted server."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from chiasm.common.bulk_redis import BulkRedis
from chiasm.common.redis_address import RedisAddress
from chiasm.common.resp_connection import WINDOW_CHUNKS, KeyedChunk
from tests.fakes.scripted_redis import ScriptedRedis

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

_TTL_MS = 5000
_STALL_S = 0.2
_PATIENT_S = 10.0
_OK = b"+OK\r\n"
_CHUNK_BYTES = 100
_NUM_CHUNKS = 6


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[ScriptedRedis]:
    async with ScriptedRedis(tmp_path / "redis.sock") as server:
        yield server


@asynccontextmanager
async def _client(server: ScriptedRedis, stall_s: float = _PATIENT_S) -> AsyncIterator[BulkRedis]:
    client = BulkRedis(RedisAddress.parse(server.url), stall_s, max_connections=2)
    try:
        yield client
    finally:
        client.close()


def _chunks(num_bytes: int = _CHUNK_BYTES, num_chunks: int = _NUM_CHUNKS) -> list[KeyedChunk]:
    """Return chunks whose contents differ and look like answers."""
    pattern = b"$-1\r\n:1\r\n-OOM\r\n+OK\r\n"
    contents = [(b"%d" % index + pattern * num_bytes)[:num_bytes] for index in range(num_chunks)]
    return [KeyedChunk(f"k:{i}", memoryview(content)) for i, content in enumerate(contents)]


def _empty(chunks: list[KeyedChunk]) -> list[KeyedChunk]:
    """Return memory for what ``chunks`` hold."""
    return [KeyedChunk(chunk.key, memoryview(bytearray(chunk.memory.nbytes))) for chunk in chunks]


def _store(server: ScriptedRedis, chunks: list[KeyedChunk]) -> list[KeyedChunk]:
    """Put ``chunks`` into the server; return memory to read them into."""
    server.values = {chunk.key.encode(): bytes(chunk.memory) for chunk in chunks}
    return _empty(chunks)


async def _write(client: BulkRedis, chunks: list[KeyedChunk]) -> list[int]:
    noted: list[int] = []
    await client.write(chunks, _TTL_MS, noted.append)
    return noted


async def _read(client: BulkRedis, chunks: list[KeyedChunk]) -> bool:
    return await client.read(chunks, _TTL_MS, lambda index: True)


@pytest.mark.parametrize("num_bytes", [1, 9, 10, 100, 1 << 20])
@pytest.mark.parametrize("num_chunks", [1, 2, 3, 7])
@pytest.mark.parametrize("is_unix", [True, False], ids=["unix", "tcp"])
async def test_what_was_written_is_read_back_over_one_connection(
    tmp_path: Path, num_bytes: int, num_chunks: int, *, is_unix: bool
) -> None:
    chunks = _chunks(num_bytes, num_chunks)
    async with (
        ScriptedRedis(tmp_path / "redis.sock" if is_unix else None) as server,
        _client(server) as client,
    ):
        noted = await _write(client, chunks)
        targets = _empty(chunks)
        accepted: list[int] = []

        def accept(index: int) -> bool:
            accepted.append(index)
            return True

        is_whole = await client.read(targets, _TTL_MS, accept)

        assert is_whole
        assert targets == chunks
        assert noted == accepted == list(range(num_chunks))
        assert server.num_connections == 1


async def test_no_chunks_are_read_and_written_at_once(server: ScriptedRedis) -> None:
    async with _client(server) as client:
        assert await _write(client, []) == []
        assert await _read(client, [])
    assert server.commands == []


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 7])
async def test_answers_that_come_in_pieces_are_put_together(
    server: ScriptedRedis, piece_bytes: int
) -> None:
    chunks = _chunks(num_bytes=20, num_chunks=4)
    server.wrong.piece_bytes = piece_bytes
    async with _client(server) as client:
        await _write(client, chunks)
        targets = _empty(chunks)

        assert await _read(client, targets)

    assert targets == chunks
    assert server.num_connections == 1


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (b"-OOM command not allowed when used memory > 'maxmemory'.\r\n", OutOfMemoryError),
        (b"-READONLY You can't write against a read only replica.\r\n", ReadOnlyError),
        (b"-NOPERM this user has no permissions\r\n", NoPermissionError),
        (b"-MOVED 3999 127.0.0.1:6381\r\n", ResponseError),
        (b"-MISCONF Redis is configured to save\r\n", ResponseError),
        (b"-LOADING Redis is loading the dataset in memory\r\n", BusyLoadingError),
        (b"-NOAUTH Authentication required.\r\n", AuthenticationError),
    ],
)
@pytest.mark.parametrize("at", [0, 3, _NUM_CHUNKS - 1])
async def test_error_in_a_pipeline_of_writes_is_told_and_the_connection_goes_on(
    server: ScriptedRedis, wrong: bytes, kind: type[RedisError], at: int
) -> None:
    server.wrong.answers = {at: wrong}
    async with _client(server) as client:
        with pytest.raises(kind):
            await _write(client, _chunks())
        assert len(server.commands) <= at + 2 + WINDOW_CHUNKS

        await _write(client, _chunks())

    assert server.num_connections == 1


@pytest.mark.parametrize("at", [0, 1, 4, 5, 2 * _NUM_CHUNKS - 1])
async def test_error_in_a_pipeline_of_reads_is_told_and_the_connection_dropped(
    server: ScriptedRedis, at: int
) -> None:
    targets = _store(server, _chunks())
    server.wrong.answers = {at: b"-NOPERM this user has no permissions\r\n"}
    async with _client(server) as client:
        with pytest.raises(NoPermissionError, match="no permissions"):
            await _read(client, targets)
        server.wrong.answers = {}

        assert await _read(client, targets)

    assert targets == _chunks()
    assert server.num_connections == 2


_WRONG_VALUES = {
    "nil": b"$-1\r\n",
    "missing": b"$0\r\n\r\n",
    "shorter": b"$99\r\n" + b"x" * 99 + b"\r\n",
    "longer": b"$101\r\n" + b"x" * 101 + b"\r\n",
    "huge": b"$536870912\r\n" + b"x" * 4096,
    "size without end": b"$" + b"1" * 4096,
    "number": b":1\r\n",
    "list": b"*1\r\n$1\r\nx\r\n",
    "status": b"+OK\r\n",
    "garbage": bytes(range(256)),
    "another protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "wrong type": b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n",
    "longer than told": b"$100\r\n" + b"x" * 150 + b"\r\n",
}


@pytest.mark.parametrize("wrong", _WRONG_VALUES.values(), ids=_WRONG_VALUES)
@pytest.mark.parametrize("index", [0, 2, _NUM_CHUNKS - 1])
async def test_wrong_value_is_a_miss_and_the_connection_is_dropped(
    server: ScriptedRedis, wrong: bytes, index: int
) -> None:
    targets = _store(server, _chunks())
    server.wrong.answers = {2 * index + 1: wrong}
    async with _client(server) as client:
        assert not await _read(client, targets)
        await asyncio.wait_for(server.closed.wait(), _PATIENT_S)
        server.wrong.answers = {}

        assert await _read(client, targets)

    assert targets == _chunks()
    assert server.num_connections == 2


async def test_key_that_expired_before_its_time_was_renewed_is_a_miss(
    server: ScriptedRedis,
) -> None:
    targets = _store(server, _chunks())
    del server.values[b"k:3"]
    async with _client(server) as client:
        assert not await _read(client, targets)


async def test_chunk_that_is_not_accepted_is_a_miss(server: ScriptedRedis) -> None:
    targets = _store(server, _chunks())
    async with _client(server) as client:
        assert not await client.read(targets, _TTL_MS, lambda index: index != 2)

        assert await _read(client, targets)


async def test_connection_with_bytes_left_over_is_not_used_again(server: ScriptedRedis) -> None:
    targets = _store(server, _chunks())
    last = bytes(_chunks()[-1].memory)
    server.wrong.answers = {2 * _NUM_CHUNKS - 1: b"$100\r\n%b\r\n+OK\r\n" % last}
    async with _client(server) as client:
        await _read(client, targets)
        server.wrong.answers = {}

        assert await _read(client, targets)

    assert server.num_connections == 2


@pytest.mark.parametrize("wrong", [b":1\r\n", b"\x00\x01\r\n", b"+" + b"x" * 9999])
async def test_write_that_is_answered_with_nonsense_fails(
    server: ScriptedRedis, wrong: bytes
) -> None:
    server.wrong.answers = {1: wrong}
    async with _client(server) as client:
        with pytest.raises(RedisConnectionError):
            await _write(client, _chunks())
        server.wrong.answers = {}

        await _write(client, _chunks())

    assert server.num_connections == 2


@pytest.mark.parametrize("closes", [True, False], ids=["closes", "hangs"])
@pytest.mark.parametrize("num_bytes", [0, 1, 4, 9, 60, 112, 671])
async def test_server_that_ends_or_hangs_within_a_read_fails_it(
    server: ScriptedRedis, num_bytes: int, *, closes: bool
) -> None:
    targets = _store(server, _chunks())
    server.wrong.max_answer_bytes, server.wrong.closes = num_bytes, closes
    async with _client(server, _STALL_S if not closes else _PATIENT_S) as client:
        expected = RedisConnectionError if closes else RedisTimeoutError
        with pytest.raises((expected, OSError)):
            await _read(client, targets)


@pytest.mark.parametrize("closes", [True, False], ids=["closes", "hangs"])
@pytest.mark.parametrize("num_bytes", [0, 3, 12])
async def test_server_that_ends_or_hangs_within_a_write_fails_it(
    server: ScriptedRedis, num_bytes: int, *, closes: bool
) -> None:
    server.wrong.max_answer_bytes, server.wrong.closes = num_bytes, closes
    async with _client(server, _STALL_S if not closes else _PATIENT_S) as client:
        expected = RedisConnectionError if closes else RedisTimeoutError
        with pytest.raises((expected, OSError)):
            await _write(client, _chunks(1 << 20))


async def test_slow_server_is_waited_for_as_long_as_it_makes_progress(
    server: ScriptedRedis,
) -> None:
    targets = _store(server, _chunks(num_chunks=2))
    server.wrong.piece_bytes = 40
    server.wrong.gate.clear()
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with _client(server, _STALL_S) as client:
        read = asyncio.create_task(_read(client, targets))
        while not read.done():
            await asyncio.wait([read], timeout=_STALL_S / 4)
            server.wrong.gate.set()
            await asyncio.sleep(0)
            server.wrong.gate.clear()

        assert await read
    assert loop.time() - started > _STALL_S


async def test_writes_in_flight_are_bounded(server: ScriptedRedis) -> None:
    server.wrong.answers = dict.fromkeys(range(20), b"")
    async with _client(server, _STALL_S) as client:
        with pytest.raises(RedisTimeoutError):
            await _write(client, _chunks(num_chunks=20))

    assert len(server.commands) == WINDOW_CHUNKS + 1


async def test_reads_in_flight_are_bounded(server: ScriptedRedis) -> None:
    targets = _store(server, _chunks(num_chunks=20))
    server.wrong.answers = dict.fromkeys(range(40), b"")
    async with _client(server, _STALL_S) as client:
        with pytest.raises(RedisTimeoutError):
            await _read(client, targets)

    assert [command[0] for command in server.commands] == [b"PEXPIRE", b"GETRANGE"] * WINDOW_CHUNKS


async def test_cancelled_transfer_lets_go_of_its_connection_and_its_thread(
    server: ScriptedRedis,
) -> None:
    targets = _store(server, _chunks())
    server.wrong.answers = dict.fromkeys(range(3, 100), b"")
    async with _client(server) as client:
        for _ in range(3):
            server.closed.clear()
            read = asyncio.create_task(_read(client, targets))
            await asyncio.wait([read], timeout=0.05)
            read.cancel()
            with pytest.raises(asyncio.CancelledError):
                await read
            await asyncio.wait_for(server.closed.wait(), _PATIENT_S)
        server.wrong.answers = {}

        assert await _read(client, targets)


async def test_connection_that_the_server_closed_is_replaced(tmp_path: Path) -> None:
    chunks = _chunks()
    async with ScriptedRedis(tmp_path / "redis.sock") as first, _client(first) as client:
        await _write(client, chunks)
        await first.__aexit__(None, None, None)
        (tmp_path / "redis.sock").unlink()
        async with ScriptedRedis(tmp_path / "redis.sock") as second:
            await _write(client, chunks)

            assert second.num_connections == 1


@pytest.mark.parametrize("answer", [b"-NOPERM no\r\n", b"+\r\n", b"$-1\r\n"])
async def test_failed_transfer_leaves_no_chunk_to_the_garbage_collector(
    server: ScriptedRedis, answer: bytes
) -> None:
    server.wrong.answers = dict.fromkeys(range(100), answer)
    async with _client(server) as client:
        gc.disable()
        try:
            for transfer in (_read, _write):
                chunks = _store(server, _chunks())
                freed, loop = asyncio.Event(), asyncio.get_running_loop()
                weakref.finalize(chunks[0].memory, loop.call_soon_threadsafe, freed.set)
                with suppress(RedisError):
                    await transfer(client, chunks)
                del chunks

                # The thread that moved them lets go a moment after its last word.
                assert await asyncio.wait_for(freed.wait(), 5)
        finally:
            gc.enable()


async def test_transfers_at_once_have_connections_of_their_own_and_keep_them(
    server: ScriptedRedis,
) -> None:
    async with _client(server) as client:
        for _ in range(3):
            await asyncio.gather(_write(client, _chunks()), _write(client, _chunks()))

    assert server.num_connections == 2


async def test_transfer_runs_beside_the_event_loop(server: ScriptedRedis) -> None:
    threads: set[int] = set()
    async with _client(server) as client:
        await client.write(_chunks(), _TTL_MS, lambda _: threads.add(threading.get_ident()))

    assert threads
    assert threading.get_ident() not in threads


async def test_server_that_is_not_there_is_told(tmp_path: Path) -> None:
    client = BulkRedis(RedisAddress(path=str(tmp_path / "none.sock")), _STALL_S, 1)
    with pytest.raises(OSError, match="No such file"):
        await _write(client, _chunks())
    client.close()
