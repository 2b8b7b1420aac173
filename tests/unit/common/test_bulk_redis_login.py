"""Tests of how ``chiasm.common.bulk_redis`` logs in, and how it knows whom it talks to."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING

import pytest
from redis.exceptions import AuthenticationError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from chiasm.common.bulk_redis import BulkRedis
from chiasm.common.redis_address import RedisAddress
from chiasm.common.resp_connection import KeyedChunk
from tests.fakes.certificates import Certificate
from tests.fakes.scripted_redis import ScriptedRedis

if TYPE_CHECKING:
    from pathlib import Path

_CONTENT = bytes(range(256)) * 4096


def _client(url: str, stall_s: float = 10.0) -> BulkRedis:
    return BulkRedis(RedisAddress.parse(url), stall_s, 1)


def _chunks(num_chunks: int = 3) -> list[KeyedChunk]:
    return [KeyedChunk(f"k:{index}", memoryview(_CONTENT)) for index in range(num_chunks)]


async def test_chunks_are_written_and_read_back_over_tls(tmp_path: Path) -> None:
    own = Certificate.make(tmp_path)
    async with ScriptedRedis(tls=own.server_context()) as server:
        client = _client(f"{server.url}?password=pw&ssl_ca_certs={own.certificate}")
        await client.write(_chunks(), 5000, lambda index: None)
        targets = [KeyedChunk(c.key, memoryview(bytearray(len(_CONTENT)))) for c in _chunks()]

        for _ in range(2):
            assert await client.read(targets, 5000, lambda index: True)

        assert targets == _chunks()
        assert server.commands[0] == [b"AUTH", b"pw"]
        assert server.num_connections == 1
        client.close()


async def test_server_that_cannot_prove_who_it_is_is_refused(tmp_path: Path) -> None:
    own, other = Certificate.make(tmp_path), Certificate.make(tmp_path, "other")
    async with ScriptedRedis(tls=own.server_context()) as server:
        client = _client(f"{server.url}?ssl_ca_certs={other.certificate}")
        with pytest.raises(ssl.SSLCertVerificationError):
            await client.write(_chunks(), 5000, lambda index: None)
        client.close()
    async with ScriptedRedis(tls=other.server_context()) as server:
        client = _client(f"{server.url}?ssl_ca_certs={other.certificate}")
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
            await client.write(_chunks(), 5000, lambda index: None)
        client.close()


async def test_server_that_hangs_over_tls_is_told(tmp_path: Path) -> None:
    own = Certificate.make(tmp_path)
    async with ScriptedRedis(tls=own.server_context()) as server:
        server.wrong.answers = dict.fromkeys(range(100), b"")
        client = _client(f"{server.url}?ssl_ca_certs={own.certificate}", stall_s=0.2)
        with pytest.raises(RedisTimeoutError):
            await client.write(_chunks(1), 5000, lambda index: None)
        client.close()


@pytest.mark.parametrize(
    ("url_end", "expected"),
    [
        ("", []),
        ("?password=p%20w", [[b"AUTH", b"p w"]]),
        ("?username=u&password=pw", [[b"AUTH", b"u", b"pw"]]),
        ("?password=pw&db=3", [[b"AUTH", b"pw"], [b"SELECT", b"3"]]),
    ],
)
async def test_login_is_as_the_url_says(
    tmp_path: Path, url_end: str, expected: list[list[bytes]]
) -> None:
    async with ScriptedRedis(tmp_path / "redis.sock") as server:
        client = _client(server.url + url_end)
        await client.write(_chunks(1), 5000, lambda index: None)
        client.close()

    assert server.commands[:-1] == expected


async def test_login_that_is_refused_is_told(tmp_path: Path) -> None:
    async with ScriptedRedis(tmp_path / "redis.sock") as server:
        server.wrong.answers = {0: b"-WRONGPASS invalid username-password pair\r\n"}
        client = _client(f"{server.url}?password=pw")
        with pytest.raises(AuthenticationError):
            await client.write(_chunks(), 5000, lambda index: None)
        client.close()


async def test_transfer_of_a_closed_client_fails_and_leaves_no_connection(tmp_path: Path) -> None:
    async with ScriptedRedis(tmp_path / "redis.sock") as server:
        client = _client(f"{server.url}?password=pw")
        server.wrong.gate.clear()
        write = asyncio.create_task(client.write(_chunks(), 5000, lambda index: None))
        while not server.commands:
            await asyncio.wait([write], timeout=0.01)
        client.close()
        server.wrong.gate.set()

        with pytest.raises(RedisConnectionError):
            await write
        with pytest.raises(RedisConnectionError):
            await client.write(_chunks(), 5000, lambda index: None)
        await asyncio.wait_for(server.closed.wait(), 10)
    assert server.commands == [[b"AUTH", b"pw"]]
