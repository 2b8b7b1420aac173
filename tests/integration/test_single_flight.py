"""Tests of ``chiasm.common.single_flight`` with a real Redis: one encode, whatever happens."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from chiasm.common.embedding_store import StoredEmbedding
from chiasm.common.errors import InvalidRequestError
from chiasm.common.lease import LeaseSettings
from chiasm.common.secrets import StoreSecrets
from chiasm.common.single_flight import SingleFlight
from tests.fakes.embeddings import make_embedding, make_layout, make_ref, patient_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.fakes.redis_server import RedisServer

pytestmark = pytest.mark.integration

_SECRETS = StoreSecrets.generate()
_SETTINGS = LeaseSettings(duration_s=0.4, heartbeat_s=0.1, check_s=5.0, patience_s=20.0)
_REF = make_ref()


class _Process:
    """What one encoder process has: its own connections and its own flights."""

    def __init__(self, url: str, settings: LeaseSettings = _SETTINGS) -> None:
        self.store = patient_store(url, _SECRETS)
        self.flights: SingleFlight[str] = SingleFlight(self.store, settings)
        self.num_encodes = 0
        self.is_encoding = asyncio.Event()
        self.may_finish = asyncio.Event()
        self.error: Exception | None = None

    async def encode(self) -> str:
        self.num_encodes += 1
        self.is_encoding.set()
        await self.may_finish.wait()
        if self.error is not None:
            raise self.error
        await self.store.put("a", make_embedding(_REF), make_layout(_REF))
        return "encoded"

    async def close(self) -> None:
        await self.flights.close()
        await self.store.close()

    def run(self) -> asyncio.Task[str | StoredEmbedding]:
        return asyncio.create_task(self.flights.run("a", _REF.embedding_id, self.encode))


@pytest_asyncio.fixture
async def first(redis_server: RedisServer) -> AsyncIterator[_Process]:
    process = _Process(redis_server.url)
    yield process
    await process.close()


@pytest_asyncio.fixture
async def second(redis_server: RedisServer) -> AsyncIterator[_Process]:
    process = _Process(redis_server.url)
    yield process
    await process.close()


async def _started(process: _Process) -> None:
    await asyncio.wait_for(process.is_encoding.wait(), 5)


async def _waiting(redis_server: RedisServer) -> None:
    """Return when somebody has subscribed to the end of a lease."""
    async with asyncio.timeout(5):
        while not await redis_server.admin.pubsub_channels():
            pass


async def test_many_callers_in_one_process_encode_once(first: _Process) -> None:
    tasks = [first.run() for _ in range(100)]
    await _started(first)
    first.may_finish.set()

    assert await asyncio.gather(*tasks) == ["encoded"] * 100
    assert first.num_encodes == 1


async def test_different_ids_do_not_wait_for_each_other(first: _Process) -> None:
    task = first.run()
    await _started(first)

    async def encode() -> str:
        return "other"

    async with asyncio.timeout(5):
        assert await first.flights.run("a", bytes(32), encode) == "other"
        assert await first.flights.run("b", _REF.embedding_id, encode) == "other"
    first.may_finish.set()
    assert await task == "encoded"


async def test_an_error_reaches_every_caller_and_the_next_one_starts_afresh(
    first: _Process,
) -> None:
    first.error = InvalidRequestError("bad picture")
    first.may_finish.set()
    results = await asyncio.gather(*(first.run() for _ in range(5)), return_exceptions=True)
    assert results == [first.error] * 5

    first.error = None
    assert await first.run() == "encoded"
    assert first.num_encodes == 2


async def test_a_caller_that_leaves_does_not_disturb_the_others(first: _Process) -> None:
    leader, other = first.run(), first.run()
    await _started(first)
    leader.cancel()
    await asyncio.wait([leader])
    first.may_finish.set()

    assert await other == "encoded"
    assert first.num_encodes == 1


async def test_the_last_caller_to_leave_ends_the_encode_and_frees_the_lease(
    first: _Process, second: _Process
) -> None:
    task = first.run()
    await _started(first)
    task.cancel()
    await asyncio.wait([task])

    second.may_finish.set()
    async with asyncio.timeout(5):
        assert await second.run() == "encoded"


async def test_another_process_waits_and_finds_the_embedding_in_the_store(
    first: _Process, second: _Process, redis_server: RedisServer
) -> None:
    leader = first.run()
    await _started(first)
    follower = second.run()
    await _waiting(redis_server)
    first.may_finish.set()

    async with asyncio.timeout(2):
        assert await leader == "encoded"
        assert await follower == StoredEmbedding(_REF, make_layout(_REF))
    assert second.num_encodes == 0


async def test_what_turned_up_in_the_store_meanwhile_is_not_encoded(first: _Process) -> None:
    await first.store.put("a", make_embedding(_REF), make_layout(_REF))
    assert isinstance(await first.run(), StoredEmbedding)
    assert first.num_encodes == 0


async def test_after_a_failed_leader_another_process_tries_itself(
    first: _Process, second: _Process, redis_server: RedisServer
) -> None:
    first.error = InvalidRequestError("bad picture")
    leader = first.run()
    await _started(first)
    follower = second.run()
    await _waiting(redis_server)
    first.may_finish.set()
    second.may_finish.set()

    async with asyncio.timeout(2):
        with pytest.raises(InvalidRequestError):
            await leader
        assert await follower == "encoded"


async def test_a_dead_leader_is_replaced_when_its_lease_runs_out(
    redis_server: RedisServer, second: _Process
) -> None:
    settings = LeaseSettings(duration_s=0.4, heartbeat_s=60.0, check_s=0.05)
    dead = _Process(redis_server.url, settings)
    task = dead.run()
    await _started(dead)
    heir = _Process(redis_server.url, settings)
    heir.may_finish.set()

    async with asyncio.timeout(5):
        assert await heir.run() == "encoded"
    await dead.close()
    await asyncio.wait([task])
    await heir.close()


async def test_a_leader_killed_by_the_system_is_replaced(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    secret_file = tmp_path / "store_secret"
    heir = patient_store(redis_server.url, StoreSecrets.load_or_create(secret_file))
    flights: SingleFlight[str] = SingleFlight(heir, LeaseSettings(check_s=0.05))
    command = [sys.executable, "-m", "tests.fakes.lease_holder", redis_server.url]
    leader = await asyncio.create_subprocess_exec(
        *command, str(secret_file), _REF.embedding_id.hex(), stdout=asyncio.subprocess.PIPE
    )
    assert leader.stdout is not None
    assert await asyncio.wait_for(leader.stdout.readline(), 30) == b"encoding\n"

    async def encode() -> str:
        return "heir"

    follower = asyncio.create_task(flights.run("a", _REF.embedding_id, encode))
    await _waiting(redis_server)
    assert not follower.done()
    leader.kill()
    await leader.wait()

    async with asyncio.timeout(LeaseSettings().duration_s + 2):
        assert await follower == "heir"
    await flights.close()
    await heir.close()


async def test_a_living_leader_keeps_its_lease_beyond_its_duration(
    redis_server: RedisServer, first: _Process
) -> None:
    settings = LeaseSettings(duration_s=0.4, heartbeat_s=0.1, check_s=0.05)
    waiter = _Process(redis_server.url, settings)
    leader = first.run()
    await _started(first)
    follower = waiter.run()
    await asyncio.wait([follower], timeout=1.0)
    assert waiter.num_encodes == 0

    first.may_finish.set()
    assert await leader == "encoded"
    assert isinstance(await follower, StoredEmbedding)
    await waiter.close()


async def test_a_waiter_whose_patience_ends_encodes_itself(
    redis_server: RedisServer, first: _Process
) -> None:
    settings = LeaseSettings(check_s=0.02, patience_s=0.1)
    waiter = _Process(redis_server.url, settings)
    waiter.may_finish.set()
    leader = first.run()
    await _started(first)

    async with asyncio.timeout(5):
        assert await waiter.run() == "encoded"
    first.may_finish.set()
    assert await leader == "encoded"
    await waiter.close()


async def test_a_revived_holder_does_not_free_the_lease_of_its_heir(
    redis_server: RedisServer, first: _Process, second: _Process
) -> None:
    task = first.run()
    await _started(first)
    (key,) = await redis_server.keys(":l")
    await redis_server.admin.set(key, "heir")
    first.may_finish.set()
    await task
    assert await redis_server.value(key) == b"heir"


@pytest.mark.parametrize("fault", ["freeze", "kill"])
async def test_without_the_store_every_process_encodes_for_itself(
    redis_server: RedisServer, first: _Process, fault: str
) -> None:
    if fault == "freeze":
        redis_server.freeze()
    else:
        await redis_server.kill()

    async def encode() -> str:
        return "local"

    async with asyncio.timeout(10):
        assert await first.flights.run("a", _REF.embedding_id, encode) == "local"


@pytest.mark.parametrize("fault", ["freeze", "kill"])
async def test_a_store_that_fails_under_leader_and_waiter_hangs_nobody(
    redis_server: RedisServer, first: _Process, fault: str
) -> None:
    waiter = _Process(redis_server.url, LeaseSettings(check_s=0.1))
    results = [asyncio.create_task(_run_without_put(process)) for process in (first, waiter)]
    await _waiting(redis_server)
    if fault == "freeze":
        redis_server.freeze()
    else:
        await redis_server.kill()
    first.may_finish.set()
    waiter.may_finish.set()

    async with asyncio.timeout(5):
        assert await asyncio.gather(*results) == ["local", "local"]
    await waiter.close()


async def _run_without_put(process: _Process) -> str | StoredEmbedding:
    """Run with an encode that stores nothing."""

    async def encode() -> str:
        await process.may_finish.wait()
        return "local"

    return await process.flights.run("a", _REF.embedding_id, encode)
